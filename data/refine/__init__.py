"""SFT data by deliberative refinement and chain-of-thought reconstruction (Nanbeige4-3B report, section SFT)."""
