"""Reports on output folders: an HTML page, a comparison, a dataset card.

outputs    reads an output folder: run, parts, counts of its processes
redact     removes passwords from settings
totals     one pass over every row: counts, distributions, frequent values, a sample
time_line  counts over time, summed over all processes
inputs     reads prompts and thumbnails of sampled rows from the input
gallery    the sampled rows as JSON for the page
plots      distributions and curves as SVG
page       the HTML file: templates, scripts, security policy
report     the page of `batchvlm report`
compare    compares two outputs row by row
differ     the table and page of `batchvlm compare`
card       README.md of the output folder
commands   the command lines
"""
