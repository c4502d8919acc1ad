"""Every host in the README: how to set it up and start it for the tests.

A Site is a temporary folder in place of the user's home. A setup function fills it and
names the servers to start. Their configuration comes from the README; only paths and
ports are replaced.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from servers import ROOT, Server, free_port, poll

IS_ROOT = os.geteuid() == 0
IS_DEBIAN = bool(shutil.which("apt-get"))
PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has its web servers
MODULES = Path("/usr/lib/apache2/modules")
# Debian's packages of what a host may lack. Other names are packages of PyPI.
PACKAGES = {
    "apache2": "apache2",
    "caddy": "caddy",
    "lighttpd": "lighttpd",
    "nginx": "nginx-light",
    "mod_passenger.so": "libapache2-mod-passenger",
    "mod_wsgi.so": "libapache2-mod-wsgi-py3",
}


def recipe(beginning, changes):
    """Return the README's block that starts with this comment, after the changes."""
    blocks = re.findall(r"^```\w+\n(.*?)^```$", readme(), re.M | re.S)
    [text] = [block for block in blocks if block.startswith(f"# {beginning}")]
    for old, new in changes.items():
        assert old in text, f"the recipe has no {old!r}:\n{text}"
        text = text.replace(old, str(new))
    return text


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def require(name, *needs):
    """Skip a host if something is missing, or fail where tests/run installs it."""
    missing = [PACKAGES.get(need, need) for need in needs if not _is_there(need)]
    if missing:
        reason = f"{name} IS NOT TESTED: it needs {' '.join(missing)}"
        (pytest.fail if IS_ROOT and IS_DEBIAN else pytest.skip)(reason)


def _is_there(need):
    if need in PACKAGES:
        return shutil.which(need, path=PATH) or (MODULES / need).exists()
    return importlib.util.find_spec(need)


class Site:
    """A home folder with the tracker in it, its servers and their URLs."""

    def __init__(self, host):
        self.host = host
        self.home = Path(tempfile.mkdtemp(prefix="bitbreeze-"))
        self.home.chmod(0o755)  # Apache's children are www-data when this is root
        self.folder = self.home / self.host.folder
        self.folder.mkdir(parents=True)
        for file in ("app.py", "wsgi.ini", "requirements.txt"):
            shutil.copy(ROOT / file, self.folder)
        self.port, self.backend = free_port(), free_port()
        self.commands, self.servers = [], []

    def prepare(self, *settings):
        """Set up the host; ``settings`` are lines for the tracker's section."""
        self.set(*self.host.settings, *settings)
        self.host.setup(self)
        if IS_ROOT and IS_DEBIAN:
            subprocess.run(["chown", "-R", "www-data:www-data", self.home], check=True)

    @property
    def urls(self):
        """The tracker's URLs: more than one if several servers share its folder."""
        return [server.url for server in self.servers if server.port]

    def set(self, *lines):
        """Add lines to the section [tracker] of wsgi.ini."""
        ini = self.folder / "wsgi.ini"
        section = "\n".join(["[tracker]", *lines])
        ini.write_text(ini.read_text().replace("[tracker]", section))

    def recipe(self, beginning, changes=()):
        """Return a block of the README, with paths in this home folder."""
        text = recipe(beginning, dict(changes))
        text = text.replace("/run/tracker", str(self.home))
        return text.replace("/home/you", str(self.home))

    def write(self, name, text):
        """Write a file to the home folder, and return its path."""
        (self.home / name).write_text(text)
        return self.home / name

    def run(self, command, port=0):
        """Add a command to start. It answers clients itself if it has a port."""
        self.commands.append((command, port))

    @contextmanager
    def serving(self):
        """Start the servers, and yield when all that have a port answer."""
        names = ("HOME", "APACHE_RUN_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
        env = dict.fromkeys(names, str(self.home))
        env["PATH"] = f"{self.home}/tracker/.venv/bin:{PATH}"
        with ExitStack() as stack:
            self.servers = []
            for command, port in self.commands:
                server = Server(command, port, env, self.folder, self.host.path)
                stack.callback(server.stop)
                self.servers.append(server)
            try:
                for server in filter(lambda server: server.port, self.servers):
                    server.wait_until_ready()
            except RuntimeError:
                raise RuntimeError(
                    f"{self.commands} print:\n{self.log()[-5000:]}"
                ) from None
            yield
            # A worker that is still starting may miss a signal to stop.
            poll(self._is_idle, 20, f"the servers to be idle:\n{self.log()[-5000:]}")

    def _is_idle(self):
        with suppress(psutil.NoSuchProcess):
            pids = [pid for s in self.servers for pid in (s.process.pid, *s.workers())]
            asleep = psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE
            return all(psutil.Process(pid).status() in asleep for pid in pids)

    def log(self):
        """Return the output and the log files of the servers."""
        logs = [path.read_text() for path in sorted(self.home.glob("*.log"))]
        return "\n".join([server.log() for server in self.servers] + logs)

    def remove(self):
        for server in self.servers:
            server.output.close()
        # Passenger removes some of its files at the same time.
        shutil.rmtree(self.home, ignore_errors=True)


# -- Python environments --------------------------------------------------------------


def own_python(site):
    """Link this Python's environment to the place where the README makes one."""
    (site.home / "tracker").mkdir(exist_ok=True)
    (site.home / "tracker/.venv").symlink_to(sys.prefix)


def system_python(site):
    """Make the environment with Debian's Python, which www-data may read.

    mod_wsgi can use no other Python. The packages are those that tests/run installed.
    """
    python, folder = "/usr/bin/python3", site.home / "tracker/.venv"
    ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    version = subprocess.run(ask, stdout=-1, text=True, check=True).stdout.strip()
    packages = ROOT / f"tests/.site-{version}"
    assert packages.exists(), f"{packages} is missing: as root, tests/run makes it"
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    target = folder / f"lib/python{version}/site-packages"
    shutil.copytree(packages, target, dirs_exist_ok=True)


# -- Servers that listen by themselves ------------------------------------------------


def alone(site, words, number=1):
    """Serve with the README's first command that contains all these words."""
    own_python(site)
    lines = site.recipe("one of these").splitlines()
    line = next(line for line in lines if all(word in line for word in words))
    for port in [site.port, site.backend][:number]:
        site.run(shlex.split(re.sub("6969|8080", str(port), line)), port)


# -- Web servers ----------------------------------------------------------------------


def nginx(site, text):
    """Serve with nginx and this server block."""
    for old in (" 80;", ":80;"):
        assert old in text
        text = text.replace(old, old.replace("80", str(site.port)))
    names = ("client_body", "proxy", "uwsgi", "fastcgi", "scgi")
    places = "".join(f"{name}_temp_path {site.home}/{name};\n" for name in names)
    # If the tests run as root, the sockets of the other servers belong to root.
    config = f"""{"user root;" if IS_ROOT else ""} daemon off; pid {site.home}/pid;
        error_log {site.home}/nginx.log; events {{}}
        http {{ access_log off; {places} {text} }}"""
    config = site.write("nginx.conf", config)
    log = site.home / "nginx.log"
    site.run(["nginx", "-e", log, "-c", config], site.port)


def apache(site, text, *modules):
    """Serve with Apache, this configuration and the modules that it names."""
    said, loads = " ".join(re.findall("a2enmod (.*)", text)), []
    for module in ("mpm_event", "authz_core", *modules, *said.split()):
        _load_module(module, loads)
    (site.home / "socks").mkdir()
    own = f"""
        ServerRoot {site.home}
        ServerName localhost
        DefaultRuntimeDir {site.home}
        PidFile {site.home}/pid
        Mutex file:{site.home}
        ErrorLog {site.home}/apache.log
        Listen {site.port}
        <IfModule passenger_module>
            PassengerInstanceRegistryDir {site.home}
            PassengerLogFile {site.home}/passenger.log
        </IfModule>
        <IfModule wsgi_module>
            WSGISocketPrefix {site.home}/wsgi
        </IfModule>
        <Directory />
            Require all denied
        </Directory>
        """
    user = "User www-data\nGroup www-data\n" if IS_ROOT else ""
    config = site.write("apache.conf", "\n".join([*loads, own, user, text]))
    site.run(["apache2", "-DFOREGROUND", "-f", config], site.port)


def _load_module(name, loads):
    """Add the lines that a2enmod would add, dependencies first."""
    path = Path(f"/etc/apache2/mods-available/{name}.load")
    for others in re.findall("^# Depends: (.*)", path.read_text(), re.M):
        for other in others.split():
            _load_module(other, loads)
    for file in (path, path.with_suffix(".conf")):
        if file.exists() and f"Include {file}" not in loads:
            loads.append(f"Include {file}")


def virtual_host(site, purpose, changes=()):
    """Serve with the README's virtual host of Apache for a purpose."""
    beginning = f"/etc/apache2/sites-available/tracker.conf, for {purpose}"
    apache(site, site.recipe(beginning, {"*:80": f"*:{site.port}", **dict(changes)}))


# -- The other setups -----------------------------------------------------------------


def gunicorn(site, address):
    """Start gunicorn behind a front end, with the README's command for an address."""
    own_python(site)
    lines = site.recipe("behind nginx").splitlines()
    [line] = [line for line in lines if address in line]
    site.run(shlex.split(line.replace("8000", str(site.backend))))


def nginx_gunicorn(site):
    gunicorn(site, "unix:")
    nginx(site, site.recipe("/etc/nginx/sites-available/tracker, for gunicorn"))


def caddy_gunicorn(site):
    gunicorn(site, "8000")
    names = "http://tracker.example.org, https://tracker.example.org"
    changes = {names: f"http://:{site.port}", "8000": site.backend}
    text = site.recipe("/etc/caddy/Caddyfile", changes)
    config = site.write("Caddyfile", "{\n admin off\n auto_https off\n}\n" + text)
    command = ["caddy", "run", "--config", config, "--adapter", "caddyfile"]
    site.run(command, site.port)


def apache_gunicorn(site):
    gunicorn(site, "8000")
    virtual_host(site, "gunicorn", {"8000": site.backend})


def uwsgi_behind_nginx(site):
    own_python(site)
    unit = site.recipe("/etc/systemd/system/tracker.service")
    line = re.search("^ExecStart=(.*)", unit, re.M)[1]
    # wsgi.ini makes uWSGI listen on a port of loopback, too.
    port = f" --set-placeholder port={site.backend}"
    site.run(shlex.split(line.replace(" wsgi.ini", f"{port} wsgi.ini")))
    nginx(site, site.recipe("/etc/nginx/sites-available/tracker, for uWSGI"))


def pythonanywhere(site):
    """Imitate PythonAnywhere: nginx names the client in headers, for one process."""
    own_python(site)
    file = site.write("wsgi.py", site.recipe("/var/www/you_pythonanywhere"))
    inner = f"127.0.0.1:{site.backend}"
    command = ["uwsgi", "--http-socket", inner, "--wsgi-file", file, "--master"]
    site.run([*command, "--die-on-term", "--buffer-size", "32768"])
    nginx(
        site,
        f"""server {{ listen 80; listen [::]:80; location / {{
            proxy_pass http://{inner};
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; }} }}""",
    )


def mod_wsgi(site):
    system_python(site)
    virtual_host(site, "mod_wsgi")


# What cPanel's form "Setup Python App" asks for, as a configuration of Apache.
PASSENGER = """
<VirtualHost *:{port}>
    ServerName tracker.example.org
    DocumentRoot {home}/tracker/public
    PassengerAppRoot {home}/tracker
    PassengerAppType wsgi
    PassengerStartupFile app.py
    PassengerPython {home}/tracker/.venv/bin/python
    <Directory {home}/tracker/public>
        Require all granted
    </Directory>
</VirtualHost>
"""


def passenger(site):
    system_python(site)
    (site.folder / "public").mkdir()
    apache(site, PASSENGER.format(port=site.port, home=site.home), "passenger")


def cgi(site):
    """Prepare app.py and wsgi.ini as the README describes it for CGI."""
    (site.home / "tracker").mkdir()
    system_python(site)
    _, shebang, setting = site.recipe("the first line of app.py").splitlines()
    program = site.folder / "app.py"
    program.write_text(re.sub("^#!.*", shebang, program.read_text(), count=1))
    program.chmod(0o755)
    site.set(setting)
    (site.home / "tracker-data").mkdir()


def cgi_apache(site):
    cgi(site)
    text = site.recipe("/home/you/public_html/tracker/.htaccess")
    (site.folder / ".htaccess").write_text(text)
    folder = site.home / "public_html"
    config = f"""DocumentRoot {folder}
        <Directory {folder}>
            AllowOverride All
            Require all granted
        </Directory>"""
    apache(site, config, "cgid", "mime")


def cgi_lighttpd(site):
    cgi(site)
    user = 'server.username = "www-data"\nserver.groupname = "www-data"'
    config = f"""{user if IS_ROOT else ""}
        server.document-root = "{site.home}/public_html"
        server.errorlog = "{site.home}/lighttpd.log"
        server.port = {site.port}
        server.bind = "127.0.0.1"
        server.http-parseopts = ( "url-ctrls-reject" => "enable" )  # as Debian's
        server.modules = ( "mod_access" )
        $SERVER["socket"] == "[::1]:{site.port}" {{ }}
        """
    text = site.recipe("/etc/lighttpd/conf-enabled/50-tracker.conf")
    command = ["lighttpd", "-D", "-f", site.write("lighttpd.conf", config + text)]
    site.run(command, site.port)


# -- The table ------------------------------------------------------------------------


class Host(NamedTuple):
    """How to set up a host, and what it needs."""

    setup: object
    needs: tuple = ()
    settings: tuple = ()  # lines for wsgi.ini
    is_proxied: bool = False  # True if a header contains the client's address
    path: str = ""  # of the tracker in its URL
    folder: str = "tracker"  # in the user's home
    peers: int = 24  # that each of the concurrent clients announces


_PROXIED = {"settings": ("proxies = 1",), "is_proxied": True}
_CGI = {"path": "/tracker/app.py", "folder": "public_html/tracker", "peers": 3}

HOSTS = {
    "python app.py": Host(partial(alone, words=["python"])),
    "gunicorn": Host(partial(alone, words=["gunicorn", "-w 4"])),
    "uWSGI": Host(partial(alone, words=["uwsgi", "port="]), ("pyuwsgi",)),
    "waitress": Host(partial(alone, words=["waitress"], number=2), ("waitress",)),
    "granian": Host(partial(alone, words=["granian"]), ("granian",)),
    "flask": Host(partial(alone, words=["flask"], number=2)),
    "nginx, uWSGI": Host(uwsgi_behind_nginx, ("nginx", "pyuwsgi")),
    "nginx, gunicorn": Host(nginx_gunicorn, ("nginx",), **_PROXIED),
    "Caddy, gunicorn": Host(caddy_gunicorn, ("caddy",), **_PROXIED),
    "Apache, gunicorn": Host(apache_gunicorn, ("apache2",), **_PROXIED),
    "Apache, mod_wsgi": Host(mod_wsgi, ("apache2", "mod_wsgi.so")),
    "Apache, Passenger": Host(passenger, ("apache2", "mod_passenger.so")),
    "PythonAnywhere, imitated": Host(
        pythonanywhere, ("nginx", "pyuwsgi"), is_proxied=True
    ),
    "Apache, CGI": Host(cgi_apache, ("apache2",), **_CGI),
    "lighttpd, CGI": Host(cgi_lighttpd, ("lighttpd",), **_CGI),
}
