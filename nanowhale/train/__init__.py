"""From text to a trained whale"""
from nanowhale.moved import names_of
__getattr__ = names_of('train')
