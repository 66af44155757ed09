""" A Hugging Face Hub on this machine, for tests

It serves what the `huggingface_hub` client asks for to create, upload, look up and download repositories. The client
finds it by HF_ENDPOINT and writes with HF_TOKEN=hf_test; it reads both at import, so give it a process of its own and
a fresh HF_HOME. Every upload is a plain one: there is no LFS and no Xet here, and no branches or pull requests.
"""
import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, Optional, Set, Tuple, Union
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_test'
USER = 'user'  # whose token it is: owns the repositories user/*

# X-Error-Code and X-Error-Message, by which the client chooses its exception. The real 401 has no code, but the client
# takes that for a missing repository over https only.
_ERRORS = {
    401: ('RepoNotFound', 'Invalid username or password.'),
    403: ('GatedRepo', 'Access to this repository is restricted and you are not in the authorized list.'),
    404: ('RepoNotFound', 'Repository not found'),
}
_RESOLVE = re.compile(r'/(?:(dataset|space)s/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)')
_API = re.compile(
    r'/api/(model|dataset|space)s/([^/]+(?:/[^/]+)?)(?:/(revision|tree|paths-info|preupload|commit)/([^/]+)(?:/(.+))?)?'
)

_POSTED = ('paths-info', 'preupload', 'commit')


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = '', message: str = '', headers: Optional[Dict[str, str]] = None):
        if status == 200:  # not the Hub's answer but a page of what stands between
            super().__init__('<!DOCTYPE html><title>Log in to this network</title>')
            self.status, self.headers = status, {'Content-Type': 'text/html'}
            return
        if not message:
            code, message = _ERRORS.get(status, (code, responses.get(status, 'Error')))
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Message': message, **(headers or {})}
        if code:
            self.headers['X-Error-Code'] = code
        if status == 429 or status >= 500:
            self.headers['Retry-After'] = '0'  # the client's five retries then take a second each


class Repo(dict):
    """The files of the main branch by name, with what the Hub keeps beside them."""

    def __init__(self, repo_id: str, private: bool = False):
        super().__init__()
        self.repo_id = repo_id
        self.private = private
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.sha = self.commit({})

    def commit(self, changes: Dict[str, Optional[bytes]]) -> str:
        """Write files, or delete those that are None, and return the new commit's sha."""
        self.update((name, data) for name, data in changes.items() if data is not None)
        for name in [name for name, data in changes.items() if data is None]:
            self.pop(name, None)
        self.sha = git_oid(json.dumps([self.repo_id, len(self.commits), {k: git_oid(v) for k, v in self.items()}]))
        self.commits[self.sha] = dict(self)
        return self.sha

    def at(self, revision: str) -> Tuple[str, Dict[str, bytes]]:
        """Sha and files of a revision, which is main or a sha."""
        if revision not in ('main', *self.commits):
            raise HubError(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return (self.sha, self) if revision == 'main' else (revision, self.commits[revision])


class HubServer:
    """The Hub, running at `endpoint` from `start` to `stop`.

    Attributes:
        repos: Repositories by type ('model', 'dataset', 'space') and id.
        requests: Method and path, without the query, of all requests in their order.
        faults: What goes wrong, by id of a repository, by id/name of one of its files or by id/verb of an API call
            (preupload, commit); with a method before it ('GET user/net') for its requests alone. An HTTP status answers
            every request (200 with an HTML page); 'timeout' hangs up after `delay` seconds and 'header' in the middle
            of the header. A commit that is 'lost' is made, but not answered. Only downloads
            are 'corrupt' (of the right size, all bytes flipped), 'flip' (one bit in the middle flipped), 'empty',
            'short' (the first half, announced as the whole), 'reset' (a reset connection after the first half), 'stall'
            (no more than the first half for `delay` seconds), 'cut' (not more than the first half ever arrives) and
            'cut-once' (the same for the first download of each file alone).
        delay: Seconds.
    """

    def __init__(self, delay: float = 2.):
        self.repos: Dict[Tuple[str, str], Repo] = {}
        self.requests: List[Tuple[str, str]] = []
        self.faults: Dict[str, Union[int, str]] = {}
        self.delay = delay
        self.was_cut: Set[Tuple[str, str]] = set()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(('127.0.0.1', 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'

    def start(self) -> 'HubServer':
        self._thread.start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: Dict[str, Union[bytes, Path]], repo_type: str = 'model') -> str:
        """Commit files to a repository, created if need be, and return the commit's sha."""
        with self.lock:
            repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_id))
            return repo.commit({k: v.read_bytes() if isinstance(v, Path) else v for k, v in files.items()})


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # the client downloads in parallel

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client hung up, or 'timeout' did
            super().handle_error(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            self.answer(url.path)
        except HubError as e:
            self.send(e.status, str(e).encode() if e.status == 200 else {'error': str(e)}, e.headers)

    do_HEAD = do_POST = do_GET

    def answer(self, path: str) -> None:
        token = self.headers.get('Authorization')
        self.logged_in = token == f'Bearer {TOKEN}'
        if token and not self.logged_in:
            raise HubError(401, message='Invalid credentials in Authorization header')
        if match := _RESOLVE.fullmatch(path):
            self.resolve(*(unquote(part or 'model') for part in match.groups()))
        elif (self.command, path) == ('GET', '/api/whoami-v2'):
            self.whoami()
        elif (self.command, path) == ('POST', '/api/repos/create'):
            self.create(json.loads(self.body))
        elif (self.command, path) == ('POST', '/api/validate-yaml'):
            self.send(200, {'errors': [], 'warnings': []})
        elif (match := _API.fullmatch(path)) and (self.command == 'POST') == (match[3] in _POSTED):
            repo_type, repo_id, verb, revision, folder = (unquote(part or '') for part in match.groups())
            self.check_fault(repo_id, verb)
            repo = self.repo(repo_type, repo_id, write=verb in ('preupload', 'commit'))
            sha, files = repo.at(revision or 'main')
            if verb == 'preupload':
                self.preupload(files)
            elif verb == 'commit':
                self.commit(repo, self.repo_url(repo_type, repo_id))
            elif verb == 'paths-info':
                paths = parse_qs(self.body.decode()).get('paths', [])
                self.send(200, [entry for entry in entries(files) if entry['path'] in paths])
            elif verb == 'tree':
                self.tree(files, f'{folder}/' if folder else '')
            else:
                self.info(repo, sha, files)
        else:
            raise HubError(404, message='Not served here')

    def send(
            self,
            status: int,
            body: Any,
            headers: Optional[Dict[str, str]] = None,
            sent: Optional[int] = None,
    ) -> None:
        """Answer with bytes or with JSON. With `sent`, hang up after that many of the announced bytes."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        # a connection that the client keeps would outlive `stop`
        for item in {'Content-Length': str(len(body)), 'Connection': 'close', **(headers or {})}.items():
            self.send_header(*item)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:sent])

    def repo(self, repo_type: str, repo_id: str, write: bool = False) -> Repo:
        """The repository, if the token may do this. To strangers, a private one is missing."""
        repo = self.hub.repos.get((repo_type, repo_id))
        owner = self.logged_in and repo_id.startswith(f'{USER}/')
        if repo is None or (repo.private and not owner) or (write and not self.logged_in):
            raise HubError(404 if self.logged_in else 401)
        if write and not owner:
            raise HubError(403, message='Forbidden: you must use a write token to upload to a repository.')
        return repo

    def check_fault(self, repo_id: str, file: str = '') -> None:
        names = (f'{repo_id}/{file}', repo_id)
        keys = (*(f'{self.command} {name}' for name in names), *names)
        self.fault = next((self.hub.faults[key] for key in keys if key in self.hub.faults), None)
        if isinstance(self.fault, int):
            raise HubError(self.fault)
        if self.fault == 'timeout':
            self.hub.stopping.wait(self.hub.delay)
        if self.fault == 'header':
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Le')
        if self.fault in ('timeout', 'header'):
            raise ConnectionAbortedError

    def resolve(self, repo_type: str, repo_id: str, revision: str, file: str) -> None:
        """Send a file or a range of it. The client's cache names it by its ETag."""
        self.check_fault(repo_id, file)
        sha, files = self.repo(repo_type, repo_id).at(revision)
        headers = {'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'}
        if file not in files:
            raise HubError(404, 'EntryNotFound', 'Entry not found', headers)
        data = files[file]
        headers['ETag'] = f'"{hashlib.sha256(data).hexdigest()}"'
        middle = len(data) // 2
        if self.fault == 'corrupt':
            data = data.translate(bytes(range(255, -1, -1)))
        elif self.fault == 'flip':
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]
        elif self.fault in ('empty', 'short'):
            data = data[:middle] if self.fault == 'short' else b''

        status, start, stop = 200, 0, len(data)
        if match := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            start, stop = int(match[1]), min(int(match[2] or stop) + 1, stop)
            if start >= stop:
                raise HubError(416, headers={'Content-Range': f'bytes */{len(data)}'})
            status, headers['Content-Range'] = 206, f'bytes {start}-{stop - 1}/{len(data)}'

        sent = None
        if self.command == 'GET' and self.fault in ('cut', 'cut-once', 'reset', 'stall'):
            if self.fault != 'cut-once' or (repo_id, file) not in self.hub.was_cut:
                sent = max(0, middle - start)
        self.send(status, data[start:stop], headers, sent)
        if sent is not None:
            self.hub.was_cut.add((repo_id, file))
        if self.fault == 'stall':
            self.hub.stopping.wait(self.hub.delay)
        elif self.fault == 'reset':
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def info(self, repo: Repo, sha: str, files: Dict[str, bytes]) -> None:
        siblings = [
            {'rfilename': name, **({'size': len(data), 'blobId': git_oid(data)} if 'blobs' in self.query else {})}
            for name, data in sorted(files.items())
        ]
        self.send(200, {
            'id': repo.repo_id,
            'author': repo.repo_id.split('/')[0],
            'sha': sha,
            'lastModified': '2026-01-01T00:00:00.000Z',
            'private': repo.private,
            'gated': False,
            'disabled': False,
            'tags': [],
            'siblings': siblings,
        })

    def tree(self, files: Dict[str, bytes], prefix: str) -> None:
        found = [entry for entry in entries(files) if entry['path'].startswith(prefix)]
        if prefix and not found:
            raise HubError(404, 'EntryNotFound', f'{prefix} does not exist')
        if self.query.get('recursive', [''])[0].lower() != 'true':
            found = [entry for entry in found if '/' not in entry['path'][len(prefix):]]
        self.send(200, found)

    def preupload(self, files: Dict[str, bytes]) -> None:
        """How to upload each file, with the oid of the present one for the client to leave out the unchanged."""
        names = [file['path'] for file in json.loads(self.body)['files']]
        oids = {name: git_oid(files[name]) for name in names if name in files}
        answer = [dict(path=name, uploadMode='regular', shouldIgnore=False, oid=oids.get(name)) for name in names]
        self.send(200, {'files': answer})

    def commit(self, repo: Repo, url: str) -> None:
        if 'create_pr' in self.query:
            raise HubError(400, message='Pull requests are not served here')
        changes = {}
        with self.hub.lock:
            for line in self.body.splitlines():
                line = json.loads(line)
                key, value = line['key'], line['value']
                if key == 'header':
                    if value.get('parentCommit', repo.sha) != repo.sha:
                        raise HubError(412, message='A commit has happened since. Please refresh and try again.')
                elif key == 'file':
                    changes[value['path']] = base64.b64decode(value['content'])
                elif key == 'deletedFile':
                    if value['path'] not in repo:
                        raise HubError(404, 'EntryNotFound', "A file with this name doesn't exist")
                    changes[value['path']] = None
                elif key == 'deletedFolder':
                    changes.update((name, None) for name in repo if name.startswith(value['path'].rstrip('/') + '/'))
                else:
                    raise HubError(400, message=f'{key} is not served here')
            sha = repo.commit(changes)
        if self.fault == 'lost':
            raise ConnectionAbortedError
        self.send(200, {'success': True, 'commitOid': sha, 'commitUrl': f'{url}/commit/{sha}', 'hookOutput': ''})

    def create(self, args: Dict[str, Any]) -> None:
        namespace, repo_type = args.get('organization') or USER, args.get('type') or 'model'
        repo_id = f'{namespace}/{args["name"]}'
        self.check_fault(repo_id)
        if not self.logged_in:
            raise HubError(401)
        answer = {'url': self.repo_url(repo_type, repo_id), 'name': repo_id}
        private = bool(args.get('private')) or args.get('visibility') == 'private'  # the old client's and the new one's
        with self.hub.lock:
            if (repo_type, repo_id) in self.hub.repos:
                self.send(409, {'error': f'You already created this {repo_type} repo: {repo_id}', **answer})
            elif namespace != USER:
                raise HubError(403, message=f"You don't have the rights to create a {repo_type} under {namespace}")
            else:
                self.hub.repos[repo_type, repo_id] = Repo(repo_id, private)
                self.send(200, answer)

    def repo_url(self, repo_type: str, repo_id: str) -> str:
        return f'{self.hub.endpoint}/{"" if repo_type == "model" else f"{repo_type}s/"}{repo_id}'

    def whoami(self) -> None:
        if not self.logged_in:
            raise HubError(401)
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
        self.send(200, {'type': 'user', 'id': USER, 'name': USER, 'fullname': USER, 'orgs': [], 'auth': auth})


def git_oid(data: Union[bytes, str]) -> str:
    data = data.encode() if isinstance(data, str) else data
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def entries(files: Dict[str, bytes]) -> List[Dict[str, Any]]:
    """The files and their folders as the Hub lists them."""
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {'.'}
    found = [{'type': 'directory', 'path': name, 'oid': git_oid(name), 'size': 0} for name in folders]
    found += [{'type': 'file', 'path': n, 'oid': git_oid(data), 'size': len(data)} for n, data in files.items()]
    return sorted(found, key=lambda entry: entry['path'])
