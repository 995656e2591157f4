"""The methods of the suite: one file each, found through the entry-point group dyndepth.methods."""
