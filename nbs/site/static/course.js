// An explorer inside a chapter takes the page's theme and as much height as it needs
function theme() {
  const chosen = document.body.dataset.theme
  return chosen==='light' || chosen==='dark' ? chosen : matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'
}

function settle(frame) {
  const page = frame.contentDocument?.documentElement   // null for pages opened as files: then the height of the stylesheet stays
  if (!page) return
  page.querySelector('head').insertAdjacentHTML('beforeend', `<base target="_top"><style>   /* the chapter is around it */
    html { overflow-y: hidden }
    body { display: flow-root }
    h1 { display: none }</style>`)
  const paint = () => { page.dataset.theme = theme() }
  const fit = () => { frame.style.height = Math.ceil(page.querySelector('body').getBoundingClientRect().height)+2+'px' }
  new MutationObserver(paint).observe(document.body, {attributeFilter: ['data-theme']})
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint)
  new ResizeObserver(fit).observe(page.querySelector('body'))
  paint()
  fit()
}

for (const frame of document.querySelectorAll('iframe.explorer')) frame.addEventListener('load', () => settle(frame))
