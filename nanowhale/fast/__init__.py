"""The same functions, faster"""
