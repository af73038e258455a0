"""From a trained whale to text, and to files"""
from nanowhale.moved import names_of
__getattr__ = names_of('generate')
