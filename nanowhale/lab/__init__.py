"""Measurements of what helps"""
