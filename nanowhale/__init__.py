"""DeepSeek-V4 from first principles: a course in notebooks, and the package it builds"""
__version__ = "0.1.0"
from nanowhale import moved   # noqa: F401  older names go on working
