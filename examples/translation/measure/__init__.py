"""How the experiments measure. START READING at ../experiments.py, then cell.py.

::

    rows.py    one cell of the sweep is one row; the CSV file, read and written
    spec.py    what one process is to measure
    texts.py   sentence pairs -> token ids -> the batches that stand for an epoch
    usage.py   memory and processor time, sampled while a cell runs
    cell.py    the process that trains: one model, one engine, some batch sizes
    clock.py   the Trainer callback that times the steps
    plan.py    which cells are still to be measured, in which processes, and what runs side by side
    child.py   following such a process, reading its results, surviving its death
    launch.py  the processes themselves, one a rank; limit.py, the time limit of a sweep
    findings.py, findings_two.py    the article's findings held against the rows, with one GPU and with two
    progress.py, panels.py                  the live table; what the figures are drawn with
    learn.py, learned.py, learning_figure.py    the process of ../learning.py; what it shows, in words and drawn
    options.py, alike.py    what command lines may say; what may stand in one CSV
"""
