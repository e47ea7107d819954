"""The configuration: its schema, its checks, and how YAML files become one config."""
