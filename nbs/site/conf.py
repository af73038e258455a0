"What Sphinx is told; build.py writes what it reads"
from build import GIT, SITE, settings

cfg = settings()
project,author,release,language = cfg['title'], cfg['author'], cfg['version'], 'en'
copyright = cfg['copyright']
extensions = ['myst_nb', 'sphinx_copybutton']
templates_path,html_static_path = [str(SITE/'templates')], [str(SITE/'static')]
exclude_patterns = ['notebooks', 'explorers']

nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'attrs_block']
myst_heading_anchors = 3

html_theme = 'furo'
html_title,html_favicon = project, str(SITE/'static/whale.svg')
html_baseurl = cfg['doc_host']+cfg['doc_baseurl']+'/'
html_css_files,html_js_files = ['course.css'], ['course.js']
html_show_sourcelink = html_copy_source = html_show_sphinx = False
pygments_style,pygments_dark_style = 'tango', 'github-dark'
html_theme_options = dict(
    top_of_page_buttons=[], navigation_with_keys=True, light_css_variables={'color-brand-primary': '#2a6fc4', 'color-brand-content': '#2a6fc4'},
    dark_css_variables={'color-brand-primary': '#6aa5e8', 'color-brand-content': '#6aa5e8'}, footer_icons=[dict(name='GitHub', url=GIT, html='GitHub')])
copybutton_exclude = '.linenos, .gp, .go'
