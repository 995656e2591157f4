"""Studies that come with the methods: plain data, one file each; ``findings`` says what the
committed runs of two of them show.

They lie outside of the methods' own folders because a method's folder is hashed into its cells: the
wording of a claim must not make anybody train routers again.
"""
