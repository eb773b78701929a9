"""The data of training: read, checked, turned into tokens and pixels, ordered, loaded ahead and put into micro-batches.

`open_dataset` gives a stage's `Dataset`: the cost of every sample, the `Order` in which they come, `prepare` for one of them
and `collate` for a micro-batch. A `Loader` prepares what the steps of a plan will ask for.
"""
