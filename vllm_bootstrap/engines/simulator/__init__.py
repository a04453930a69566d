"""A runnable engine without a model: OpenAI-shaped, with vLLM's process tree, log phases, metrics and failures.

Started with ``python -m vllm_bootstrap.engines.simulator --model NAME``, by the daemon or by hand. It simulates load
time and inference, so that everything around an engine can be tried without a GPU. Its answers are made from the
prompt's own words and are the same each time.

Layers, each importing only those before it: ``text``, ``metrics``, ``stepcost``, ``deaths``, ``knobs``, ``sequence``
(values) - ``blocks``, ``batching`` (as vLLM does it), ``model`` (at fixed rates) - ``log``, ``tree``, ``hub``, ``boot``
(becoming ready) - ``http``, ``websocket``, ``upload`` (wire) - ``formats``, ``generation``, ``routes_*`` (the API) -
``server`` - ``__main__``.

It must not know the daemon: nothing here is imported by it but ``knobs``.
"""
