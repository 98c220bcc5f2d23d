"""What a model is: its spec, its family and its layers. `loading` reads it from disk."""
