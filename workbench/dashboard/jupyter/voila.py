"""Voilà's configuration for the workbench, read by `workbench dashboard` and, on Binder, by the Jupyter server."""

from workbench.dashboard.catalog import give_token, prepare_page

c = get_config()  # noqa: F821  (Jupyter's loader defines it)

c.Voila.log_level = "ERROR"  # the address is printed; a failing cell is logged with its traceback
c.VoilaConfiguration.template = "workbench"
c.VoilaConfiguration.theme = "light"
c.VoilaConfiguration.page_config_hook = prepare_page
c.VoilaConfiguration.prelaunch_hook = give_token
c.VoilaConfiguration.show_tracebacks = True  # the page folds them below a sentence; an empty page explains nothing
c.VoilaConfiguration.http_keep_alive_timeout = 5

# A closed tab's kernel holds a model in memory: Voilà leaves some behind, so idle ones without a page are ended.
c.MappingKernelManager.cull_idle_timeout = 120
c.MappingKernelManager.cull_interval = 30
c.MappingKernelManager.cull_connected = False
