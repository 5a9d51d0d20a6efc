# Sourced: what tests and measurements need beside the clients of this machine's packages.
# shellcheck shell=bash disable=SC2154

# Python packages of the tests, with the versions that they were tried with.
python_packages=(ansible-core==2.19.14 ansible-pylibssh==1.4.0 asyncssh==2.24.1 paramiko==5.1.0)

# openssh_server FOLDER: the files of OpenSSH's server that the base image lacks, from Debian packages, to be laid
# over a container of it. Not installed here.
openssh_server() {
  local folder=$1 packages=(openssh-server openssh-sftp-server libwrap0) part=$1.part package
  [[ ! -x $folder/usr/sbin/sshd ]] || return 0
  command -v apt-get >/dev/null || fail "the base image is Debian's: apt-get is needed to fetch ${packages[*]}"
  rm -rf "$part"
  mkdir -p "$part/root"
  say "fetching OpenSSH's server"
  # The lists may be missing, or name a version that is there no more.
  (cd "$part" && { apt-get download -q "${packages[@]}" || { apt-get update -q && apt-get download -q "${packages[@]}"; }; }) \
    >"$part/log" 2>&1 || fail "apt-get could not fetch ${packages[*]} (all it said: $part/log)"
  for package in "$part"/*.deb; do
    dpkg-deb -x "$package" "$part/root"
  done
  # No folder that is a link in the image.
  mkdir -p "$part/files/usr"
  mv "$part/root/usr/"{sbin,lib} "$part/files/usr/"
  rm -rf "$folder"
  mv "$part/files" "$folder"
  rm -rf "$part"
}

# python_clients FOLDER: a virtual environment with the clients that are Python packages.
python_clients() {
  local folder=$1 stamp=$1/installed
  [[ $(cat "$stamp" 2>/dev/null) != "${python_packages[*]}" || ! -x $folder/bin/python ]] || return 0
  python3 -c 'import ensurepip, venv' 2>/dev/null || install_packages "Python's virtual environments" python3-venv
  say "installing ${python_packages[*]}"
  rm -rf "$folder"
  python3 -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check "${python_packages[@]}" ||
    fail "pip could not install ${python_packages[*]}"
  printf %s "${python_packages[*]}" >"$stamp"
}
