"""Targets that a configuration from a file must not reach: each acts when it is instantiated."""

from typing import Any


def _target(target: str, /, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    return {"_target_": target, "_args_": list(arguments), **keywords}


def gadgets(path: str) -> dict[str, dict[str, Any]]:
    """Returns nodes by name; each creates a file at a path, or reads one beside it.

    Arguments:
        path: A path at which there is no file.
    """
    shell = f"id > {path}"
    code = f"__import__('os').system('{shell}')"
    make = _target("pathlib.Path", path)
    encode = "builtins.str.encode"
    interpreter = _target("code.InteractiveInterpreter")
    return {
        "torch run": _target("torch.utils.collect_env.run", shell),
        "sympify": _target("sympy.sympify", code),
        "parse_expr": _target("sympy.parsing.sympy_parser.parse_expr", code),
        "write_text": _target("pathlib.Path.write_text", make, "x"),
        "eval": _target("builtins.eval", code),
        "system": _target("os.system", shell),
        "subprocess": _target("subprocess.run", ["touch", path]),
        "timeit": _target("timeit.timeit", code),
        "interpreter": _target("code.InteractiveInterpreter.runsource", interpreter, code),
        "torch.load": _target("torch.load", f"{path}.pkl", weights_only=False),
        "torch.hub": _target("torch.hub.load", f"{path}.hub", "make", source="local", name=path),
        "numpy.load": _target("numpy.load", f"{path}.npy", allow_pickle=True),
        "joblib": _target("joblib.load", f"{path}.pkl"),
        "rmtree": _target("shutil.rmtree", f"{path}.victim"),
        "copyfile": _target("shutil.copyfile", "/etc/hostname", path),
        "savetxt": _target("numpy.savetxt", path, ["x"], fmt="%s"),
        "memmap": _target("numpy.memmap", path, mode="w+", shape=[1]),
        "gzip": _target("gzip.open", path, "w"),
        "zipfile": _target("zipfile.ZipFile", path, "w"),
        "torch.save": _target("torch.save", 1, path),
        "urlretrieve": _target("urllib.request.urlretrieve", "file:///etc/hostname", path),
        "mkdir": _target("os.mkdir", path),
        "old name of the writer": _target(
            "diffusion_lab.files.write_atomic", make, _target("builtins.bytes", [65])
        ),
        "writer": _target("diffusion_lab.atomic_io.write_csv", make, [], []),
        "module of a module": _target("diffusion_lab.nn.unet.torch.save", 1, path),
        "function of a package": _target("diffusion_lab.runs.mark_finished", make),
        "logger": _target("diffusion_lab.logger.wandb_logger.make_logger", path, "a", "b", "c"),
        "spawn": _target("setuptools._distutils.spawn.spawn", ["touch", path]),
        "webbrowser": _target("webbrowser.get", f"touch {path} %s &"),
        "spawnv": _target(
            "multiprocessing.util.spawnv_passfds", _target(encode, "/usr/bin/touch"),
            [_target(encode, "touch"), _target(encode, path)], [],
        ),
        "asyncio": _target(
            "asyncio.run", _target("asyncio.create_subprocess_shell", f"touch {path}")
        ),
    }  # fmt: skip


def positions(gadget: dict[str, Any]) -> dict[str, Any]:
    """Returns values that hold a gadget, by the kind of place where it stands."""
    partial = {"_target_": "torch.optim.Adam", "_partial_": True, "params": gadget}
    harmless = {"_target_": "builtins.bool", "_args_": [gadget]}
    return {
        "value": gadget,
        "partial": {**gadget, "_partial_": True},
        "inside a partial": partial,
        "list": [1, gadget],
        "list of lists": [[gadget]],
        "dict": {"a": {"b": gadget}},
        "dict in a list": [{"a": gadget}],
        "argument": harmless,
        "argument of an allowed class": {"_target_": "torch.nn.Identity", "_args_": [gadget]},
        "tuple": (gadget,),
    }
