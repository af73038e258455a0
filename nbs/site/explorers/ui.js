// What the explorers share: elements, sliders, charts, tokens to click, and the course's colours and theme

export const COLORS = {rope: 'var(--blue)', content: 'var(--grey)', query: 'var(--blue)', key: 'var(--amber)', sink: 'var(--pink)', bias: 'var(--violet)',
  good: 'var(--teal)', bad: 'var(--rust)', shared: 'var(--grey)', hc: 'var(--rust)', mhc: 'var(--teal)', main: 'var(--blue)', mtp: 'var(--pink)'}
export const EXPERTS = ['var(--blue)', 'var(--amber)', 'var(--teal)', 'var(--pink)', 'var(--violet)', 'var(--rust)']   // one for each
export const STREAMS = EXPERTS

try {                                               // the course's pages let a reader choose light or dark: so it is here
  const theme = localStorage.getItem('theme')
  if (theme==='light' || theme==='dark') document.documentElement.dataset.theme = theme
} catch { /* a page without storage follows the system */ }

if (self!==top) document.documentElement.dataset.framed = ''   // inside a chapter, which has navigation of its own

export const $ = id => document.getElementById(id)

// A token's text with its blanks to be seen
export const visible = piece => /^ +$/.test(piece) ? '␣'.repeat(piece.length) : piece.replace(/\n/g, '⏎').replace(/\t/g, '⇥')

const SVG = new Set('svg g line circle path text rect polyline'.split(' '))

// An element: attributes, `on...` handlers, children
export function el(tag, attrs={}, ...children) {
  const e = SVG.has(tag) ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
  for (const [name, value] of Object.entries(attrs))
    if (name.startsWith('on')) e.addEventListener(name.slice(2), value)
    else if (value!==false && value!=null) e.setAttribute(name, value===true ? '' : value)
  e.append(...children)
  return e
}

export const show = (id, ...children) => $(id).replaceChildren(...children)

// The value of every named input below `root`, as numbers where they are, kept beside it in an <output> and handed on at each change
export function controls(root, changed) {
  const read = () => {
    const values = {}
    for (const input of root.querySelectorAll('input, select')) {
      if (input.type==='radio' && !input.checked) continue
      values[input.name] = input.type==='checkbox' ? input.checked : input.type==='range' ? +input.value : input.value
      const out = input.parentElement.querySelector('output')
      if (out && input.type==='range') out.textContent = input.value
    }
    return values
  }
  root.addEventListener('input', () => changed(read()))
  addEventListener('resize', () => changed(read()))
  return read
}

export const number = (x, digits=3) => (Math.abs(x)>=1e5 ? x.toExponential(1) : (Math.abs(x)<10**-digits/2 ? 0 : x).toFixed(digits)).replaceAll('-', '−')
export const percent = x => `${(100*x).toFixed(x<.0995 ? 1 : 0)} %`

// Curves into an element, as wide as it is: lines is a list of {y: [...], color, dash}, their y from `from` on; `mark` is a place on the x axis
export function chart(id, {lines, label, x=[0, 1], y, log=false, mark, ticks=[], height=190, xname='', xs}) {
  const width = Math.max($(id).clientWidth, 240)
  const [left, right, top, bottom] = [46, 8, 8, 34], f = log ? v => Math.log10(Math.max(v, 10**y[0])) : v => v
  const [low, high] = y, px = v => left+(v-x[0])/(x[1]-x[0])*(width-left-right)
  const py = v => top+(high-Math.min(Math.max(f(v), low), high))/(high-low)*(height-top-bottom)
  const s = el('svg', {viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label})
  for (const t of ticks) s.append(el('line', {class: 'axis', x1: left, x2: width-right, y1: py(t), y2: py(t)}),
    el('text', {x: left-6, y: py(t)+4, 'text-anchor': 'end'}, log && (t>=1e4 || t<.01) ? `1e${Math.round(Math.log10(t))}`.replace('-', '−') : `${t}`.replace('-', '−')))
  for (const t of xs ?? x) s.append(el('text', {x: px(t), y: height-bottom+16, 'text-anchor': 'middle'}, `${t}`.replace('-', '−')))
  s.append(el('text', {x: (left+width-right)/2, y: height-3, 'text-anchor': 'middle'}, xname))
  if (mark!=null) s.append(el('line', {x1: px(mark), x2: px(mark), y1: top, y2: height-bottom, stroke: 'var(--ink)', 'stroke-dasharray': '2 3'}))
  for (const {y, color, dash, from=x[0], step=1, dot} of lines) {
    s.append(el('polyline', {points: y.map((v, i) => `${px(from+i*step).toFixed(1)},${py(v).toFixed(1)}`).join(' '), fill: 'none', stroke: color, 'stroke-width': 2, 'stroke-dasharray': dash ?? 'none'}))
    if (dot!=null) s.append(el('circle', {cx: px(dot), cy: py(y[Math.round((dot-from)/step)]), r: 5, fill: color, stroke: 'var(--page)', 'stroke-width': 1.5}))
  }
  show(id, s)
}

export const bar = (share, color, mark) => {
  const fill = el('i', {style: `width: ${100*Math.min(Math.max(share, 0), 1)}%; background: ${color}`})
  return el('div', {class: 'bar'}, fill, ...(mark==null ? [] : [el('b', {style: `left: calc(${100*mark}% - 1px)`})]))
}

// Tokens as buttons in a row of text. One of them can be reached by Tab, the others by the arrow keys. paint(button, i) adds colour
export function tokenRow(root, pieces, chosen, choose, paint) {
  const had = root.contains(document.activeElement), buttons = []
  root.replaceChildren()
  pieces.forEach((piece, i) => {
    const b = el('button', {type: 'button', 'aria-pressed': `${i===chosen}`, tabindex: i===chosen ? 0 : -1, onclick: () => choose(i)}, visible(piece) || ' ')
    paint?.(b, i)
    buttons.push(b)
    root.append(b)
    if (piece.endsWith('\n') && !pieces[i+1]?.startsWith('\n')) root.append(el('span', {class: 'wrap'}))
  })
  root.onkeydown = e => {
    const move = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[e.key]
    if (!move) return
    e.preventDefault()
    choose(Math.min(Math.max(chosen+move, 0), pieces.length-1))
  }
  if (had) buttons[chosen]?.focus()
}
