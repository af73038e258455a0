"""What the notebooks need and the package does not: figures, exercises, their checker"""
