"""What is computed: one attention method a file, each a frozen dataclass."""
