"""TODO nb_lightning/checkpoints"""
