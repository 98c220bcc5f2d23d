"""The families, one file each. `zipage.models.registry` lists them."""
