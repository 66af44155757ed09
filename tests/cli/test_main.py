""" The command line itself; its faults are in tests/faults/test_cli.py """
import subprocess
import sys
from pathlib import Path

import pytest

from timm_sepool.cli.main import main

COMMANDS = ('quickstart', 'list', 'imagefolder', 'push', 'convert', 'plot', 'bench', 'compare', 'cards')


def test_command_is_installed() -> None:
    """As the console script and as a module; without a command, exit code 2."""
    script = Path(sys.executable).with_name('timm-sepool')
    for command in ([str(script)], [sys.executable, '-m', 'timm_sepool']):
        out = subprocess.run([*command, '--help'], capture_output=True, text=True, check=True).stdout
        assert all(f'\n    {name}' in out for name in COMMANDS)
        assert subprocess.run(command, capture_output=True).returncode == 2


@pytest.mark.parametrize('argv, message', [
    ('list --nope', 'unrecognized arguments: --nope.'),
    ('compare --out a --data-dir b', "arguments: --data-dir. Write ' -- ' before the arguments of train.py."),
])
def test_unknown_options(capsys, argv: str, message: str) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(argv.split())
    assert capsys.readouterr().err.endswith(f'{message}\n')


@pytest.mark.parametrize('argv', ['--help', *(f'{name} --help' for name in COMMANDS), 'list', 'list --json'])
def test_fast_without_torch(argv: str) -> None:
    """Help and the list need neither torch nor timm, which take seconds to import."""
    code = (
        'import sys\nfrom timm_sepool.cli.main import main\n'
        f'try: main({argv.split()})\nexcept SystemExit as e: assert not e.code\n'
        'assert not {"torch", "timm"} & {*sys.modules}')
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout and not process.stderr, process.stderr
