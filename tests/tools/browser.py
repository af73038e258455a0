"""A real browser for the tests: headless Chromium, driven by its own DevTools protocol. It notes all that pages ask for and complain about"""
import base64, json, os, re, shutil, subprocess, tempfile, threading, time, urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from runs import PATIENCE

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
QUIET = '''--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage --remote-debugging-port=0 --remote-allow-origins=*'''.split()

def chromium():
    "The program, or None"
    return os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, NAMES)), None)

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

def serve(folder):
    "A web server for `folder` in a thread; returns it, and its address"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'

class Browser:
    "One tab. `asked` and `complaints` hold the addresses requested and the errors shown since the last `open`"
    def __init__(self, wait=PATIENCE):
        import websocket
        self.home,self.n,self.asked,self.complaints = tempfile.TemporaryDirectory(ignore_cleanup_errors=True),0,[],[]
        command = [chromium(), *QUIET, f'--user-data-dir={self.home.name}', 'about:blank']
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.until(lambda: (f := Path(self.home.name)/'DevToolsActivePort').exists() and f.read_text().split('\n')[0], wait)
        tabs = json.loads(urllib.request.urlopen(f'http://127.0.0.1:{port}/json', timeout=wait).read())
        self.socket = websocket.create_connection(next(t for t in tabs if t['type']=='page')['webSocketDebuggerUrl'], timeout=wait)
        for part in ('Page', 'Network', 'Runtime', 'Log'): self.call(f'{part}.enable')

    @staticmethod
    def until(what, wait=PATIENCE):
        "Ask until the answer is true"
        end = time.monotonic()+wait
        while not (answer := what()):
            if time.monotonic()>end: raise TimeoutError('the browser does not answer')
            time.sleep(0.05)
        return answer

    def note(self, event):
        kind,p = event.get('method'),event.get('params', {})
        if kind=='Network.requestWillBeSent': self.asked.append(p['request']['url'])
        elif kind=='Network.loadingFailed' and not p.get('canceled'): self.complaints.append(p['errorText'])
        elif kind=='Runtime.exceptionThrown':
            self.complaints.append(p['exceptionDetails'].get('exception', {}).get('description', p['exceptionDetails']['text']))
        elif kind=='Runtime.consoleAPICalled' and p['type'] in ('error', 'assert'): self.complaints.append(str([a.get('value') for a in p['args']]))
        elif kind=='Log.entryAdded' and p['entry']['level']=='error': self.complaints.append(p['entry']['text']+' '+p['entry'].get('url', ''))
        return kind

    def call(self, method, **params):
        "One command of the protocol and its result"
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get('id')!=self.n: self.note(answer)
        if 'error' in answer: raise RuntimeError(f'{method}: {answer["error"]["message"]}')
        return answer['result']

    def open(self, url, width=1280, height=900, dark=False):
        "Go to `url` and wait until it is loaded and its formulas are set"
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<600)
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])
        self.call('Page.navigate', url='about:blank')
        self.asked,self.complaints = [],[]
        self.call('Page.navigate', url=url)
        there = json.dumps(re.split('[#?]', url)[0])
        self.until(lambda: self.js(f'document.readyState=="complete" && location.href.split(/[#?]/)[0]=={there}'))
        self.js('window.MathJax?.startup?.promise')
        return self

    def js(self, code):
        "The value of an expression on the page; promises are waited for"
        res = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in res: raise RuntimeError(res['exceptionDetails'].get('exception', {}).get('description', 'error on the page'))
        return res['result'].get('value')

    def picture(self, path, whole=False):
        "What the page looks like, as PNG"
        more = {}
        if whole:
            size = self.call('Page.getLayoutMetrics')['cssContentSize']
            more = dict(captureBeyondViewport=True, clip=dict(x=0, y=0, width=size['width'], height=min(size['height'], 12000), scale=1))
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png', **more)['data']))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.home.cleanup()
