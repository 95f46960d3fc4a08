"""Training, evaluation and replay of next-vector predictors; needs the `train` extra.

To train: `config` (options), `models`, `training` (what a training consists of and how it is saved), `ranks` (its
processes), `trainer` (the loop), `logs` (what it says), `checkpoints` and `runs` (its files), `embed` (data of texts).
To judge: `baselines`, `metrics`, `bootstrap` and `collapse`, which `evaluate` brings together. To compare: `demo`,
`sweep` and `replay`, whose figures `comparison` puts into words and `report` into a page. `commands` and `toml` are the
command line, `auditing` names an audit's model and loss by options.
"""
