import sys

from zipage.serve.cli import serve

sys.exit(serve())
