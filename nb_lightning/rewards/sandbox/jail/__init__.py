"""The code that runs beside the trainer: the zygote, and the locked-down jobs forked from it. Standard library only.

A bare interpreter runs `zygote.py` as a script and imports these modules by plain name, so they import nothing of the
package.
"""
