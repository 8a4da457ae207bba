"""The commands of the `jaxft` program, one file each."""
