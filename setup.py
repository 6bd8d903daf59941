"""The compiled parts; everything else is in pyproject.toml.

Built for the stable ABI of Python 3.11, so that one wheel a platform is enough. Python without a GIL
has no stable ABI yet: there, they are built for that version, and say that they need no GIL. They are
optional: without a compiler numpy does the same, slower, and files are read and not mapped.
"""

import sysconfig

from setuptools import Extension, setup

STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")
MACROS = [("Py_LIMITED_API", "0x030b0000")] if STABLE else []

setup(
    ext_modules=[
        Extension(
            "streamshard.disk._mapping",
            ["streamshard/disk/_mapping.c"],
            define_macros=MACROS,
            py_limited_api=STABLE,
            optional=True,
        ),
        Extension(
            "streamshard.tensors._kernels",
            ["streamshard/tensors/_kernels.c"],
            depends=["streamshard/tensors/_tiles.h"],
            define_macros=MACROS,
            extra_compile_args=["-O3", "-ffp-contract=off"],
            py_limited_api=STABLE,
            optional=True,
        ),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE else {},
)
