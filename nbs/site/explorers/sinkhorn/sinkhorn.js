// A 4 x 4 matrix of logits, the mix that Sinkhorn makes of it, and what many such mixes do one after the other
import {sinkhorn} from '../whale.js'
import {$, COLORS, STREAMS, chart, controls, el, number, show} from '../ui.js'

const N = 4, ROUNDS = 20, all = Array.from({length: N}, (_, i) => i)
const PRESETS = {
  small: [.4, -.3, .2, .1, -.5, .6, 0, .3, .2, -.1, .7, -.6, -.2, .5, -.4, .3],
  large: [3, -1, 2, -2.5, 2.5, 1, -3, .5, 3.5, -2, 1.5, 0, 1, -.5, 2, -3],
  keep: [5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 5, 0, 0, 0, 0, 5],
  hard: [8, -8, -8, -8, 8, -8, -8, -8, 8, 8, -8, -8, 8, 8, 8, -8]}
let logits = [...PRESETS.large]

const gives = m => all.map(j => all.reduce((total, k) => total+m[j*N+k], 0))
const receives = m => all.map(k => all.reduce((total, j) => total+m[j*N+k], 0))
const off = sums => Math.max(...sums.map(s => Math.abs(s-1)))
const transpose = m => all.flatMap(j => all.map(k => m[k*N+j]))
const carry = (m, x) => all.map(k => all.reduce((total, j) => total+m[j*N+k]*x[j], 0))     // as `mix` does: the sum is over sources

function cell(i, m) {
  const set = z => { logits[i] = Math.round(10*Math.min(Math.max(z, -9), 9))/10; redraw() }
  const share = m[i], e = el('div', {class: 'cell', role: 'slider', tabindex: 0, 'data-cell': i, 'aria-valuemin': -9, 'aria-valuemax': 9, 'aria-valuenow': logits[i],
    'aria-label': `logit of source ${Math.floor(i/N)+1} for target ${i%N+1}`, style: `background: color-mix(in srgb, ${COLORS.mhc} ${Math.round(75*Math.min(share, 1))}%, var(--page))`,
    onkeydown: e => {
      const by = {ArrowUp: .1, ArrowRight: .1, ArrowDown: -.1, ArrowLeft: -.1, PageUp: 1, PageDown: -1}[e.key]
      if (by) { e.preventDefault(); set(logits[i]+by) }
    }}, el('b', {}, share.toFixed(3)), el('small', {}, number(logits[i], 1)))
  return e
}

let drag = null                                     // of a cell: where it began; the matrix is drawn anew meanwhile
$('matrix').addEventListener('pointerdown', e => {
  const at = e.target.closest('.cell')?.dataset.cell
  if (at==null) return
  drag = {i: +at, y: e.clientY, from: logits[at]}
  $('matrix').setPointerCapture(e.pointerId)
  $('matrix').querySelector(`[data-cell="${at}"]`).focus({preventScroll: true})
  e.preventDefault()
})
$('matrix').addEventListener('pointermove', e => {
  if (!drag) return
  logits[drag.i] = Math.round(10*Math.min(Math.max(drag.from+(drag.y-e.clientY)/20, -9), 9))/10
  redraw()
})
for (const end of ['pointerup', 'pointercancel']) $('matrix').addEventListener(end, () => drag = null)

function drawMatrix(m) {
  const focused = document.activeElement?.dataset?.cell
  const sum = s => el('div', {class: 'sum', style: Math.abs(s-1)>.01 ? `color: ${COLORS.bad}; font-weight: 600` : null}, s.toFixed(3))
  const cells = all.flatMap(j => [...all.map(k => cell(j*N+k, m)), el('div', {class: 'sum'}, el('small', {}, 'gives'), el('br'), sum(gives(m)[j]))])
  show('matrix', ...cells, ...receives(m).map(s => el('div', {class: 'sum'}, el('small', {}, 'receives'), el('br'), sum(s))))
  if (focused!=null) $('matrix').querySelector(`[data-cell="${focused}"]`).focus({preventScroll: true})
}

const VERDICT = {
  right: (f, b) => `Each stream is an average of all four, so ones stay ones at any depth: now ${f}. Only the gradient feels an unfinished Sinkhorn: streams get ${b} of it, four in all.`,
  transposed: (f, b) => `The wrong index is summed over. Now the signal itself bears the error that Sinkhorn left: streams of ones have become ${f}, and the gradient ${b}. The loss of such a model still falls.`,
  free: (f, b) => `Without division nothing holds the streams: ones have become ${f}, the gradient ${b}.`}
const range = xs => { const [a, b] = [Math.min(...xs), Math.max(...xs)].map(v => number(v, 2)); return a===b ? a : `${a} to ${b}` }

function stack(m, depth) {                          // four lines: a vector of ones carried through m again and again
  const steps = [all.map(() => 1)]
  for (let l=0; l<depth; l++) steps.push(carry(m, steps[l]))
  return steps
}

function draw({iters, depth, how}) {
  const m = sinkhorn(logits, iters)
  drawMatrix(m)
  const rounds = Array.from({length: ROUNDS}, (_, i) => sinkhorn(logits, i+1)), y = [-7, 1]
  chart('errors', {label: 'error of the sums after each round', x: [1, ROUNDS], xs: [1, 5, 10, 15, 20], y, log: true, ticks: [1e-6, 1e-4, .01, 1], mark: iters, xname: 'rounds',
    lines: [{y: rounds.map(m => off(gives(m))), color: COLORS.bad}, {y: rounds.map(m => off(receives(m))), color: COLORS.main}]})
  $('given').textContent = number(off(gives(m)), 6)
  $('received').textContent = number(off(receives(m)), 6)
  const used = how==='free' ? logits : how==='right' ? m : transpose(m), free = how==='free'
  const forward = stack(used, depth), backward = stack(transpose(used), depth)
  const power = Math.ceil(Math.log10(Math.max(10, ...[...forward, ...backward].flat().map(Math.abs)))/4)     // of a step of the axis
  const plot = (name, steps) => {
    const size = v => free ? Math.abs(v) : v
    chart(name, {label: `${name}, by depth`, x: [0, depth], xs: [0, depth], xname: name==='forward' ? 'sublayers passed' : 'sublayers passed, from the end',
      ...(free ? {y: [-power, 4*power], log: true, ticks: [0, 1, 2, 3, 4].map(n => 10**(n*power))} : {y: [0, 4], ticks: [0, 1, 2, 3, 4]}),
      lines: all.map(k => ({y: steps.map(x => size(x[k])), color: STREAMS[k], dash: ['none', '9 4', '4 3', '2 4'][k], step: 1}))})
  }
  plot('forward', forward); plot('backward', backward)
  $('verdict').textContent = VERDICT[how](range(forward[depth]), range(backward[depth]))
}

const values = {}, reads = []
for (const box of document.querySelectorAll('.controls')) reads.push(controls(box, () => redraw()))
function redraw() { for (const read of reads) Object.assign(values, read()); draw(values) }
for (const button of document.querySelectorAll('[data-preset]')) button.onclick = () => { logits = [...PRESETS[button.dataset.preset]]; redraw() }
redraw()
