"""The architecture, as a paper would write it"""
from nanowhale.moved import names_of
__getattr__ = names_of('model')
