"""What runs beside the trainer: the zygote and, forked from it, the locked-down jobs. Standard library only.

The modules in here are imported by plain name in a bare interpreter (`zygote.py` is run as a script), so they import
nothing of the package.
"""
