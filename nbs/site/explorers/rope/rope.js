// Two positions, four pairs of channels: the score and the answer depend on the distance alone
import {rotate, ropeAngles, sum} from '../whale.js'
import {$, COLORS, chart, controls, el, number, show} from '../ui.js'

const R = 8, LAST = 200
const query = [1.1, .3, .9, -.6, .7, .7, .4, .9], key = [.8, .7, .4, -1, 1, .2, .8, .5]
const dot = (a, b) => sum(a.map((x, i) => x*b[i]))
const pairs = x => Array.from({length: R/2}, (_, i) => x.slice(2*i, 2*i+2))

function clock(title, hands, note) {
  const s = el('svg', {viewBox: '-60 -60 120 120', role: 'img', 'aria-label': `${title}, ${note}`}, el('circle', {class: 'axis', r: 55}))
  for (const {at: [x, y], color, faint} of hands) {
    const g = el('g', {opacity: faint ? .3 : 1}, el('line', {x2: 40*x, y2: -40*y, stroke: color, 'stroke-width': faint ? 2 : 4, 'stroke-linecap': 'round'}))
    if (!faint) g.append(el('circle', {cx: 40*x, cy: -40*y, r: 5, fill: color}))
    s.append(g)
  }
  return el('figure', {}, s, el('figcaption', {}, title, el('br'), el('small', {class: 'number'}, note)))
}

function strip(t, s) {                              // the text as a line, both tokens on it, and the distance between
  const width = Math.max($('strip').clientWidth, 240), x = p => 10+p/LAST*(width-20), [low, high] = t<s ? [t, s] : [s, t]
  return el('svg', {viewBox: `0 0 ${width} 46`, role: 'img', 'aria-label': `query at ${t}, key at ${s}`}, el('line', {class: 'axis', x1: 10, x2: width-10, y1: 30, y2: 30}),
    el('line', {x1: x(low), x2: x(high), y1: 30, y2: 30, stroke: 'var(--ink)', 'stroke-width': 3}),
    el('text', {x: Math.min(Math.max((x(low)+x(high))/2, 30), width-30), y: 14, 'text-anchor': 'middle'}, `${high-low} apart`),
    el('circle', {cx: x(s), cy: 30, r: 8, fill: COLORS.key}), el('circle', {cx: x(t), cy: 30, r: 8, fill: COLORS.query, 'fill-opacity': .85}))
}

const tokens = n => n>=1000 ? `${Math.round(n/100)/10}k` : n.toFixed(n<10 ? 1 : 0)

function draw({t, s, theta}) {
  theta = +theta
  const angles = p => ropeAngles(p, R, theta), q = rotate(query, angles(t)), k = rotate(key, angles(s))
  const speeds = angles(1), [qs, ks, q0, k0] = [q, k, query, key].map(pairs)
  show('strip', strip(t, s))
  show('clocks', ...qs.map((hand, i) => clock(`a turn in ${tokens(2*Math.PI/speeds[i])} tokens`,
    [{at: q0[i], color: COLORS.query, faint: true}, {at: k0[i], color: COLORS.key, faint: true}, {at: ks[i], color: COLORS.key}, {at: hand, color: COLORS.query}],
    `adds ${number(dot(hand, ks[i]))}`)))
  $('distance').textContent = `${t-s}`.replace('-', '−')
  $('score').textContent = number(dot(q, k))
  const far = 60, at = Array.from({length: 2*far+1}, (_, i) => dot(q, rotate(key, angles(t-(i-far)))))
  chart('curve', {label: 'score by distance', x: [-far, far], xs: [-60, -30, 0, 30, 60], y: [-4.5, 4.5], ticks: [-4, -2, 0, 2, 4], height: 220, xname: 'distance, query minus key',
    lines: [{y: at, color: COLORS.rope, from: -far, dot: Math.abs(t-s)<=far ? t-s : null}]})

  const back = $('back').checked, home = (t, s) => back ? rotate(rotate(key, angles(s)), angles(t), -1) : rotate(key, angles(s))
  const now = home(t, s), next = home(t+1, s+1)
  show('answer', ...pairs(now).map((hand, i) => clock(`channels ${2*i}, ${2*i+1}`, [{at: k0[i], color: COLORS.content, faint: true}, {at: hand, color: back ? COLORS.good : COLORS.bad}],
    `${number(hand[0], 2)}, ${number(hand[1], 2)}`)))
  $('moved').textContent = number(Math.sqrt(sum(now.map((v, i) => (v-next[i])**2))))
  $('moved').style.color = back ? COLORS.good : COLORS.bad
}

const read = controls($('controls'), draw), redraw = () => draw(read())
for (const button of document.querySelectorAll('[data-shift]')) button.onclick = () => {
  const [t, s] = ['t', 's'].map(name => document.querySelector(`[name=${name}]`))
  const by = Math.min(Math.max(+button.dataset.shift, -Math.min(+t.value, +s.value)), LAST-Math.max(+t.value, +s.value))
  t.value = +t.value+by; s.value = +s.value+by
  redraw()
}
$('back').onchange = redraw
redraw()
