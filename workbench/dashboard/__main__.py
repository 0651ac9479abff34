"""Print the environment variables as shell commands: `eval "$(python -m workbench.dashboard)"`; Binder needs them."""

import shlex

from workbench.dashboard.server import environment

for name, value in environment().items():
    print(f"export {name}={shlex.quote(value)}")
