"""The networks: two files each, the network and its variants. `registry` imports all of them."""
