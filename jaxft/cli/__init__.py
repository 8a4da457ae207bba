"""The `jaxft` program, with one file per command; `commands` lists them."""
