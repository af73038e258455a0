"What the finished site is made of: where its links lead, and how heavy its pages are"
import re
from html import unescape
from urllib.parse import unquote, urlsplit

MOST = 1_000_000   # bytes of a page with its pictures; scripts, styles and fonts are shared by all pages and kept by the browser
IMG = r'<img[^>]*\ssrc="([^"]+)"'

def html(site): return sorted(site.resolve().rglob('*.html'))
def attributes(text, names): return [unescape(v) for v in re.findall(rf'\s(?:{names})="([^"]*)"', text)]
def beside(page, address): return (page.parent/unquote(address)).resolve() if address else page

def dead_links(site):
    "`page: link` for each link, picture, script or frame of the site that leads nowhere in it, or to no such place of a page"
    text = {p: p.read_text(encoding='utf-8') for p in html(site)}
    places = {p: {*attributes(t, 'id|name')} for p,t in text.items()}
    for page,t in text.items():
        for link in dict.fromkeys(attributes(t, 'href|src')):
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            to = beside(page, url.path)
            lost = to in places and url.fragment and unquote(url.fragment) not in places[to]
            if lost or not to.exists(): yield f'{page.relative_to(site.resolve())}: {link}'

def weight(page):
    "Bytes of a page and of the pictures on it"
    sources = {src for src in re.findall(IMG, page.read_text(encoding='utf-8')) if not urlsplit(src).scheme}
    return page.stat().st_size+sum(p.stat().st_size for p in {beside(page, s) for s in sources} if p.exists())

def heaviest(site, n=10):
    "The n heaviest pages, heaviest first: (bytes, page)"
    return sorted(((weight(p), p.relative_to(site.resolve()).as_posix()) for p in html(site)), reverse=True)[:n]
