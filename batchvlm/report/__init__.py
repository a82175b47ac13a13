"""An output folder -> what a person sees of it: a page, a comparison, a dataset card.

outputs    an output folder as read back: run, parts, counts of its processes
redact     settings without passwords
totals     one pass over every row: counts, distributions, frequent values, a sample
time_line  counts over time, of all processes together
inputs     the input behind sampled rows: prompts and thumbnails
gallery    the sampled rows as the page shows them
plots      distributions and curves as SVG
page       the HTML file: templates, scripts, what the browser may do
report     `batchvlm report`
compare    two outputs, row by row
differ     `batchvlm compare`
card       README.md of the output folder
commands   the command lines
"""
