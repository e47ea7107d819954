"""Where model-written code runs: a pool of workers, each a locked-down interpreter (jail/)."""
