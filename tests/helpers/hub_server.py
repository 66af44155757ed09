""" A Hugging Face Hub on this machine, for tests

It serves what the `huggingface_hub` client asks for to create, upload, look up and download repositories, without LFS,
Xet, folders and branches. The client finds it by HF_ENDPOINT and writes with HF_TOKEN=hf_test, both read at import.
"""
import base64
import hashlib
import json
import re
import secrets
import sys
import threading
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple, Union
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_test'

# the real 401 has no code, but the client takes that for a missing repository over https only
_ERROR_CODES = {401: 'RepoNotFound', 403: 'GatedRepo', 404: 'RepoNotFound'}
_RESOLVE = re.compile(r'/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)')
_API = re.compile(r'/api/(model|dataset)s/([^/]+/[^/]+)(?:/(?:(revision|tree|preupload|commit)/([^/]+)))?')


class HubError(Exception):
    """An HTTP status other than success, or 200 with a page of what stands between the client and the Hub."""

    def __init__(self, status: int, code: str = ''):
        super().__init__(responses[status])
        self.status, self.code = status, code or _ERROR_CODES.get(status, '')


class Repo(dict):
    """The files of the main branch by name, with those of all commits by their sha."""

    def __init__(self, repo_id: str, private: bool = False):
        super().__init__()
        self.repo_id, self.private = repo_id, private
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.sha = self.commit({})

    def commit(self, changes: Dict[str, bytes]) -> str:
        """Write files and return the new commit's sha."""
        self.update(changes)
        self.sha = secrets.token_hex(20)
        self.commits[self.sha] = dict(self)
        return self.sha


class HubServer:
    """The Hub, running at `endpoint` to the end of the process.

    Attributes:
        repos: Repositories by type ('model', 'dataset') and id.
        requests: Method and path of all requests in their order.
        faults: What goes wrong, by id of a repository, id/name of a file or id/verb of an API call (preupload, commit),
            for one method with 'GET ' before it. A status for all requests (200 is an HTML page), a 'missing' file,
            'timeout' after `delay` seconds, an end in the middle of the 'header', a commit that is made but 'lost'. For
            files: bytes replace the file, after half of it the connection ends ('cut') or waits `delay` s ('stall').
        was_cut: Id and name of the files that were sent by half.
    """
    delay = 0.3

    def __init__(self):
        self.repos: Dict[Tuple[str, str], Repo] = {}
        self.requests: List[Tuple[str, str]] = []
        self.faults: Dict[str, Union[int, str, bytes]] = {}
        self.was_cut: Set[Tuple[str, str]] = set()
        server = _Server(('127.0.0.1', 0), _Handler)
        server.hub = self
        self.endpoint = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def add(self, repo_id: str, files: Dict[str, Union[bytes, Path]], repo_type: str = 'model') -> str:
        """Commit files to a repository, which may be new, and return the commit's sha."""
        repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id))
        return repo.commit({k: v.read_bytes() if isinstance(v, Path) else v for k, v in files.items()})


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # the client downloads in parallel

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client hung up, or a fault did
            super().handle_error(*args)


class _Handler(BaseHTTPRequestHandler):  # HTTP/1.0: one connection per request
    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.hub: HubServer = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.hub.requests.append((self.command, path))
        try:
            self.answer(path)
        except HubError as e:
            headers = {'X-Error-Message': str(e), 'X-Error-Code': e.code, 'Retry-After': '0'}  # code: the exception
            self.send(e.status, b'<title>Log in</title>' if e.status == 200 else {'error': str(e)}, **headers)

    do_HEAD = do_POST = do_GET

    def answer(self, path: str) -> None:
        if match := _RESOLVE.fullmatch(path):
            self.resolve(match[1] or 'model', *match.groups()[1:])
        elif path == '/api/repos/create':
            self.create(**json.loads(self.body))
        elif path == '/api/validate-yaml':
            self.send(200, {'errors': [], 'warnings': []})
        elif match := _API.fullmatch(path):
            repo_type, repo_id, verb, revision = match.groups()
            repo, files = self.repo(repo_type, repo_id, revision or 'main', verb or '')
            if verb == 'preupload':  # how to upload each file; the client leaves out those whose oid is the same
                self.send(200, {'files': [
                    dict(path=f['path'], uploadMode='regular', shouldIgnore=False, oid=git_oid(files.get(f['path'])))
                    for f in json.loads(self.body)['files']]})
            elif verb == 'commit':
                self.commit(repo)
            elif verb == 'tree':
                self.send(200, [dict(type='file', path=k, oid=git_oid(v), size=len(v)) for k, v in files.items()])
            else:
                siblings = [{'rfilename': name} for name in files]
                self.send(200, {'id': repo_id, 'sha': repo.sha, 'private': repo.private, 'siblings': siblings})
        else:
            raise HubError(404, 'EntryNotFound')

    def send(self, status: int, body: Any, sent: Optional[int] = None, **headers: str) -> None:
        """Answer with bytes or with JSON. With `sent`, stop after that many of the announced bytes."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for item in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(*item)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:sent])

    def check_token(self) -> None:
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            raise HubError(401)

    def check_fault(self, repo_id: str, name: str = '') -> None:
        keys = [prefix + key for key in (f'{repo_id}/{name}', repo_id) for prefix in (f'{self.command} ', '')]
        self.fault = next((self.hub.faults[key] for key in keys if key in self.hub.faults), None)
        if isinstance(self.fault, int):
            raise HubError(self.fault)
        if self.fault == 'missing':
            raise HubError(404, 'EntryNotFound')
        if self.fault in ('timeout', 'header'):
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Le' if self.fault == 'header' else b'')
            threading.Event().wait(self.hub.delay if self.fault == 'timeout' else 0)  # tests replace time.sleep
            raise ConnectionAbortedError

    def repo(self, repo_type: str, repo_id: str, revision: str, name: str) -> Tuple[Repo, Dict[str, bytes]]:
        """The repository, and its files at 'main' or at the sha of a commit; `name` as in `check_fault`."""
        self.check_fault(repo_id, name)
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None:
            raise HubError(404)
        if repo.private or self.command == 'POST':
            self.check_token()
        return repo, repo.commits[repo.sha if revision == 'main' else revision]

    def resolve(self, repo_type: str, repo_id: str, revision: str, file: str) -> None:
        """Send a file or a range of it. The client's cache names it by its ETag."""
        repo, files = self.repo(repo_type, repo_id, revision, file)
        if file not in files:
            raise HubError(404, 'EntryNotFound')
        headers = {'X-Repo-Commit': repo.sha if revision == 'main' else revision}
        headers['ETag'] = f'"{hashlib.sha256(files[file]).hexdigest()}"'
        data = self.fault if isinstance(self.fault, bytes) else files[file]
        status, start = 200, 0
        if match := re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')):
            status, start = 206, int(match[1])
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        half = self.command == 'GET' and self.fault in ('cut', 'stall')
        self.send(status, data[start:], sent=max(0, len(data) // 2 - start) if half else None, **headers)
        if half:
            self.hub.was_cut.add((repo_id, file))
            threading.Event().wait(self.hub.delay if self.fault == 'stall' else 0)

    def create(self, name: str, organization: str = 'user', type: str = 'model', **options) -> None:
        repo_id = f'{organization}/{name}'
        self.check_fault(repo_id)
        self.check_token()
        status = 409 if (type, repo_id) in self.hub.repos else 200
        private = bool(options.get('private')) or options.get('visibility') == 'private'  # old client or new one
        self.hub.repos.setdefault((type, repo_id), Repo(repo_id, private))
        self.send(status, {'url': f'{self.hub.endpoint}/{repo_id}', 'name': repo_id})

    def commit(self, repo: Repo) -> None:
        """Make the commit whose header and files are the lines of the body. Other entries would raise KeyError."""
        header, *files = [json.loads(line)['value'] for line in self.body.splitlines()]
        sha = repo.commit({file['path']: base64.b64decode(file['content']) for file in files})
        if self.fault == 'lost':
            raise ConnectionAbortedError
        url = f'{self.hub.endpoint}/{repo.repo_id}/commit/{sha}'
        self.send(200, {'success': True, 'commitOid': sha, 'commitUrl': url, 'hookOutput': ''})


def git_oid(data: Optional[bytes]) -> Optional[str]:
    return None if data is None else hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
