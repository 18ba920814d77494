"""One file per related system, each through the same extension points as a reader's own idea.

Balancers here are named in yaml, with their settings:

    model:
      custom_balance: {class_path: sigma_lite.papers.shinka.Shinka, init_args: {threshold: 0.064}}
"""
