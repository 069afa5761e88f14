"""The packaged suites, a YAML file each."""
