#!/bin/sh
# The tests of the Python package; what needs numpy, torch or transformers is skipped, and named, where they are missing.
# usage: EEP_BIN=build tests/python/run.sh [PYTHON]
set -u
python=${1:-python3}
cd "$(dirname "$0")/../.." || exit 1
EEP_BIN=$(cd "${EEP_BIN:-build}" && pwd) && export EEP_BIN
command -v "$python" >/dev/null || { echo "not tested: the Python package, since $python is not here"; printf '0 passed, 0 failed, 1 skipped\n'; exit 0; }
for module in numpy torch transformers; do
    "$python" -c "import $module" 2>/dev/null || echo "not tested: what needs $module, which $python has not"
done
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=tests/python exec "$python" - <<'END'
import sys
import unittest

loader = unittest.TestLoader()
suite = unittest.TestSuite(loader.loadTestsFromName(name) for name in ("test_layout", "test_eep", "test_torch", "test_compare",
                                                                    "test_tcpstore"))
result = unittest.TextTestRunner(verbosity=2, stream=sys.stdout).run(suite)
bad = len(result.failures) + len(result.errors)
print(f"{result.testsRun - bad - len(result.skipped)} passed, {bad} failed, {len(result.skipped)} skipped")
sys.exit(1 if bad else 0)
END
