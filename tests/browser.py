"""A headless Chromium, driven through two pipes in the browser's own protocol, and a web server for one folder"""
import base64, fcntl, functools, json, os, shutil, subprocess, tempfile, threading, time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FLAGS = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe'''.split()

def find_browser():
    "Path of a Chromium, or None"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

@contextmanager
def serve(folder):  # yields its address
    "A folder, served on this machine alone"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{server.server_port}'
        finally: server.shutdown()

class Page:
    "One tab: what it asked for, what it complained about, and a way to ask it"
    def __init__(self,
        wait=120):  # seconds after which an answer is late
        self.wait,self.n,self.requests,self.errors,self.bytes,self.loaded = wait,0,[],[],0,False
        self.home = tempfile.mkdtemp()
        (there,self.out),(self.inn,back) = os.pipe(),os.pipe()
        there,back = (fcntl.fcntl(f, fcntl.F_DUPFD_CLOEXEC, 10) for f in (there, back))       # out of the way of 3 and 4
        def descriptors(): os.dup2(there, 3); os.dup2(back, 4)                                # where Chromium listens and answers
        self.process = subprocess.Popen([find_browser(), *FLAGS, f'--user-data-dir={self.home}', 'about:blank'],
            close_fds=False, preexec_fn=descriptors, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there); os.close(back)
        self.rest,self.session = b'',None
        target = next(t for t in self.ask('Target.getTargets')['targetInfos'] if t['type']=='page')
        self.session = self.ask('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.ask(f'{domain}.enable')

    def read(self):
        "The next message"
        while b'\0' not in self.rest:
            chunk = os.read(self.inn, 2**20)
            if not chunk: raise RuntimeError('the browser has gone')
            self.rest += chunk
        message,self.rest = self.rest.split(b'\0', 1)
        return json.loads(message)

    def note(self, message):
        "Keep what an event tells"
        method,p = message.get('method'),message.get('params', {})
        if method=='Network.requestWillBeSent': self.requests.append(p['request']['url'])
        if method=='Network.loadingFailed' and not p.get('canceled'): self.errors.append(p['errorText'])
        if method=='Network.dataReceived': self.bytes += p['dataLength']
        if method=='Runtime.exceptionThrown': self.errors.append(json.dumps(p['exceptionDetails'])[:500])
        if method=='Runtime.consoleAPICalled' and p['type'] in ('error', 'warning', 'assert'): self.errors.append(json.dumps(p['args'])[:500])
        if method=='Log.entryAdded' and p['entry']['level'] in ('error', 'warning'): self.errors.append(p['entry']['text']+' '+p['entry'].get('url', ''))
        if method=='Page.loadEventFired': self.loaded = True

    def ask(self, method, **params):
        "Send one command and wait for its answer"
        self.n += 1
        os.write(self.out, json.dumps(dict(id=self.n, method=method, params=params)|(dict(sessionId=self.session) if self.session else {})).encode()+b'\0')
        while True:
            message = self.read()
            if message.get('id')!=self.n: self.note(message); continue
            if 'error' in message: raise RuntimeError(f'{method}: {message["error"]["message"]}')
            return message['result']

    def js(self, code):
        "The value of an expression in the page; promises are awaited"
        got = self.ask('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in got: raise RuntimeError(json.dumps(got['exceptionDetails'])[:800])
        return got['result'].get('value')

    def until(self, code):
        "Wait until an expression is true in the page"
        end = time.monotonic()+self.wait
        while not (value := self.js(code)):
            if time.monotonic()>end: raise RuntimeError(f'still not so after {self.wait} s: {code}; errors: {self.errors}')
            time.sleep(.05)
        return value

    def open(self, url, width=1000, height=900, theme='light'):
        "Load a page at a size, in light or dark"
        self.requests,self.errors,self.bytes,self.loaded = [],[],0,False
        self.ask('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<500)
        self.ask('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=theme)])
        self.ask('Page.navigate', url=url)
        while not self.loaded: self.note(self.read())

    def press(self, key):
        "A key, down and up, where the focus is"
        code = dict(Enter=13, Tab=9, ArrowUp=38, ArrowDown=40, ArrowLeft=37, ArrowRight=39)[key]
        text = dict(text='\r') if key=='Enter' else {}
        for kind,more in (('keyDown', text), ('keyUp', {})):
            self.ask('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def mouse(self, kind, x, y):
        "mousePressed, mouseMoved or mouseReleased, with the left button"
        self.ask('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=int(kind!='mouseReleased'), clickCount=1)

    def picture(self, path):
        "The whole page, as a PNG"
        size = self.ask('Page.getLayoutMetrics')['cssContentSize']
        clip = dict(x=0, y=0, width=size['width'], height=size['height'], scale=1)
        shot = self.ask('Page.captureScreenshot', format='png', captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(shot['data']))

    def __enter__(self): return self
    def __exit__(self, *args):
        os.close(self.out); os.close(self.inn)
        self.process.terminate()
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()
        shutil.rmtree(self.home, ignore_errors=True)
