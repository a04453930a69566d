from vllm_bootstrap.engines.environment import HARMLESS, Verdict, base_environment, judge, put_first_on_path

SURROUNDINGS = {
    "PATH": "/usr/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
    "HF_HOME": "/hf",
    "https_proxy": "http://proxy:3128",
    "LD_PRELOAD": "/lib/libtcmalloc.so",
    "AWS_SECRET_ACCESS_KEY": "cloud",
    "HF_TOKEN": "hub",
    "VLLM_ACCESS_KEY": "key",
    "ORCHESTRATOR_TOKEN": "key",
    "AUTH_KEYS_FILE": "/etc/keys",
    "VLLM_API_KEY": "key",
    "VLLM_BOOTSTRAP_ACCESS_KEY": "key",
    "VBS_LAUNCH": "marker",
    "PYTHONPATH": "/code",
}


def test_engines_inherit_an_allow_list():
    assert base_environment(SURROUNDINGS) == {
        "HF_HOME": "/hf",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
        "PATH": "/usr/bin",
        "https_proxy": "http://proxy:3128",
    }


def test_the_operator_may_pass_more_through_but_never_keys():
    names = (
        "LD_PRELOAD",
        "NOT_THERE",
        "VLLM_ACCESS_KEY",
        "ORCHESTRATOR_TOKEN",
        "VLLM_BOOTSTRAP_ACCESS_KEY",
        "HF_TOKEN",
        "VBS_LAUNCH",
        "VLLM_API_KEY",
        "AUTH_KEYS_FILE",
    )
    extra = base_environment(SURROUNDINGS, passthrough=names).keys() - base_environment(SURROUNDINGS).keys()
    assert extra == {"LD_PRELOAD"}


def test_harmless_variables_are_harmless():
    assert {judge(name) for name in HARMLESS} == {Verdict.HARMLESS}


def test_a_folder_is_searched_first():
    assert put_first_on_path({"PATH": "/usr/bin"}, "/opt/bin") == {"PATH": "/opt/bin:/usr/bin"}
    assert put_first_on_path({}, "/opt/bin")["PATH"].startswith("/opt/bin:/usr/local/bin:")
