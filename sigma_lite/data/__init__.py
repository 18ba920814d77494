"""TEXT -> TOKENS -> ROWS, in the order of the data:

corpora.py     documents from this Python's own library, from files, or from Hugging Face datasets
listing.py     which files a path names, each once
tables.py      rows of table files (json, csv, parquet)
json_values.py a .json file value by value
unpack.py      .gz, .bz2, .xz and .zst, unpacked while they are read
library.py     the library's modules, and documents of four domains made of them
tokenizer.py   byte-level BPE
kinds.py       what each token is: keyword, docstring, number, ...
stages.py      documents become token files, and an interrupted run goes on where it was
families.py    documents that share much of their text, which the split must not part
baselines.py   what a compressor makes of the held-out text, without and with the training text
shards.py      `prepare` runs the stages, `load` opens what they made
stream.py      token files as one long memory-mapped array
domains.py     which domain a row belongs to, and an order in which neighbours share one
rows.py        batches in an order that is a function of (seed, rows consumed); plain torch
order.py       which rows a step takes where there are several weighted sources, stages and a ramp
mixture.py     several corpora under one tokenizer, prepared side by side and read as one
datamodule.py  the same for a Lightning Trainer
"""
