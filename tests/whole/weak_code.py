"""Finds code that loads, runs or fetches what it should not: ``findings(source)``.

Names are followed through imports and their aliases. Mentioning a forbidden name is enough: who
may not call ``eval`` needs no reference to it either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

BUILTINS = {"eval", "exec", "compile", "__import__", "builtins", "__builtins__"}
FORBIDDEN = {
    *("os.system", "os.popen", "os.startfile", "os.tempnam", "os.tmpnam", "tempfile.mktemp"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "pty.spawn", "code.interact", "logging.config.listen"),
    *("importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader"),
    *("torch.jit.load", "torch.hub", "torch.package", "torch.export.load"),
    *("torch.serialization", "pandas.read_pickle", "shutil.unpack_archive"),
}
FORBIDDEN_BEGINNINGS = ("os.exec", "os.spawn", "os.posix_spawn")
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLES_ERRORS = {"UnpicklingError", "PickleError"}
NETWORK = {"socket", "ssl", "http", "urllib.request", "requests", "httpx", "aiohttp", "ftplib"}
MODULES = {"runpy", "imp", "telnetlib", "smtplib", "xmlrpc", "tarfile", "xml", *NETWORK}
"""Modules that are not imported at all. Only pip and the hub's own libraries use the network."""
YAML = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all", "YAMLError"}
PROCESSES = {
    f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "Popen")
}
METHODS = {"extractall", "unpack_archive", "to_pickle", "read_pickle"}
LOCAL = {"source", "prepare_embedded()"}
"""First arguments of ``from_pretrained`` that are folders made from a pinned asset."""


def findings(source: str) -> list[str]:
    """``line: what`` of everything in ``source`` that is forbidden."""
    tree = ast.parse(source)
    return sorted({f"{line}: {what}" for line, what in _Finder(tree).found()})


class _Finder:
    def __init__(self, tree: ast.AST) -> None:
        self.tree = tree
        self.names = dict(_imported(tree))
        self.inside = {
            id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        self.calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        self.lists = _lists(tree)

    def found(self) -> Iterator[tuple[int, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from ((node.lineno, what) for what in _modules(node))
            elif isinstance(node, ast.Name | ast.Attribute):
                # Of a.b.c, only the whole is looked at.
                if id(node) not in self.inside:
                    yield from ((node.lineno, what) for what in self._mention(node))
                if isinstance(node, ast.Attribute) and node.attr in METHODS:
                    yield node.lineno, f".{node.attr}"
            elif isinstance(node, ast.Call):
                yield from ((node.lineno, what) for what in self._keywords(node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from ((node.lineno, what) for what in _defaults(node.args))
            elif isinstance(node, ast.AnnAssign) and _trusts(node.target, node.value):
                yield node.lineno, "trust_remote_code on"

    def _dotted(self, node: ast.expr) -> str:
        """The full name that an expression refers to; empty if it is no name."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            before = self._dotted(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""

    def _mention(self, node: ast.expr) -> Iterator[str]:
        name = self._dotted(node)
        first, _, rest = name.partition(".")
        if first in BUILTINS:
            yield name
        if any(name == each or name.startswith(f"{each}.") for each in FORBIDDEN):
            yield name
        if name.startswith(FORBIDDEN_BEGINNINGS):
            yield name
        if first in PICKLES and rest not in PICKLES_ERRORS:
            yield name
        if first == "yaml" and rest not in YAML:
            yield name
        call = self.calls.get(id(node))
        if name == "torch.load" and not (call and _keyword(call, "weights_only") is True):
            yield "torch.load without weights_only=True"
        if name in PROCESSES and not (call and self._plain_words(call)):
            yield f"{name} without a list of words"
        if first == "subprocess" and not rest:
            yield "subprocess as a value"

    def _keywords(self, call: ast.Call) -> Iterator[str]:
        for keyword in call.keywords:
            value = keyword.value
            constant = value.value if isinstance(value, ast.Constant) else ...
            if keyword.arg == "shell" and constant is not False:
                yield "shell"
            if keyword.arg == "allow_pickle" and constant is not False:
                yield "allow_pickle"
            if keyword.arg == "trust_remote_code" and constant is True:
                yield "trust_remote_code on"
            if keyword.arg == "weights_only" and constant is not True:
                yield "weights_only off"
        function = call.func
        if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
            source = ast.unparse(call.args[0]) if call.args else ""
            if source not in LOCAL and not any(each.arg == "revision" for each in call.keywords):
                yield "from_pretrained without revision"

    def _plain_words(self, call: ast.Call) -> bool:
        if not call.args:
            return False
        words = call.args[0]
        if isinstance(words, ast.Name):
            return words.id in self.lists
        return isinstance(words, ast.List | ast.Tuple)


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Name in the module -> what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                whole = each.name if each.asname else each.name.partition(".")[0]
                yield each.asname or whole, whole
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"


def _modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """What an import statement brings that it may not."""
    if isinstance(node, ast.Import):
        whole = [each.name for each in node.names]
    elif node.level:
        return
    else:
        module = str(node.module)
        whole = [module, *(f"{module}.{each.name}" for each in node.names)]
        for each in node.names:
            own = f"{module}.{each.name}"
            pickles = module.partition(".")[0] in PICKLES and each.name not in PICKLES_ERRORS
            yaml = module.partition(".")[0] == "yaml" and each.name not in YAML
            builtin = module == "builtins" and each.name in BUILTINS
            star = each.name == "*"
            if pickles or yaml or builtin or star or {own, module} & FORBIDDEN:
                yield f"import of {own}"
    for name in whole:
        if any(name == each or name.startswith(f"{each}.") for each in MODULES):
            yield f"import of {name}"
        if name.partition(".")[0] in PICKLES - {"pickle", "_pickle"}:
            yield f"import of {name}"


def _lists(tree: ast.AST) -> set[str]:
    """Names to which nothing but lists of words is ever assigned."""
    good: set[str] = set()
    bad: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.NamedExpr):
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                (good if isinstance(value, ast.List) else bad).add(target.id)
    return good - bad


def _keyword(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


def _defaults(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for argument, default in pairs:
        if _trusts(ast.Name(argument.arg), default):
            yield "trust_remote_code on"


def _trusts(target: ast.expr, value: ast.expr | None) -> bool:
    named = isinstance(target, ast.Name) and target.id == "trust_remote_code"
    return named and isinstance(value, ast.Constant) and value.value is True
