#!/usr/bin/env bash
# setup.sh FOLDER PYTHON: an arm64 Python with Numba and pytest, to be run on this machine by qemu: FOLDER/python SCRIPT.
#
# For Debian and its kin, whose apt can fetch another architecture's packages. All it does is done in FOLDER: no root, no
# package installed, no chroot, no binfmt_misc. About a minute, and 400 MB. Does only what is not yet done. PYTHON is the
# native interpreter, whose versions of numpy, numba and the like are taken over, so that only the processor differs.
set -eu
for tool in apt-get dpkg-deb; do
  command -v $tool >/dev/null || {
    echo "$tool: not found, and needed to fetch an arm64 Python. Run this on Debian or its kin" >&2
    exit 1
  }
done
folder=$(realpath -m "${1:?the folder to set up}") native=${2:?the native Python}

# unpack ARCHITECTURE FOLDER PACKAGE...: packages of that architecture and all they need, without the machine's own apt
# lists and package states being read or changed.
unpack() {
  local architecture=$1 into=$2 apt=$folder/apt-$1
  shift 2
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$into"
  : >"$apt/status"
  local options=(-qq -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o "Dir::State=$apt"
    -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt/cache"
    -o APT::Install-Recommends=false -o APT::Sandbox::User= -o Acquire::Languages=none -o Debug::NoLocking=1)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" --yes --download-only install "$@" >/dev/null
  for package in "$apt"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$into"; done
  rm -rf "$apt"
}

qemu=$(command -v qemu-aarch64-static || command -v "$folder/qemu/usr/bin/qemu-aarch64-static" || true)
if [ -z "$qemu" ]; then
  echo "== Fetching qemu"
  unpack "$(dpkg --print-architecture)" "$folder/qemu" qemu-user-static
  qemu=$folder/qemu/usr/bin/qemu-aarch64-static
  find "$folder/qemu" -type f ! -name 'qemu-aarch64*' -delete  # the other processors' are 340 MB
fi

root=$folder/root
if [ ! -e "$root/complete" ]; then
  echo "== Fetching an arm64 Python"
  unpack arm64 "$root" python3 libstdc++6
  touch "$root/complete"
fi
python=$(basename "$(ls "$root"/usr/bin/python3.*[0-9])")

wanted=$("$native" -c 'from importlib.metadata import version
needed = "numpy numba llvmlite pytest iniconfig packaging pluggy pygments".split()
print(*(f"{name}=={version(name)}" for name in needed))')
packages=$folder/packages
if [ "$(cat "$packages/complete" 2>/dev/null)" != "$wanted" ]; then
  echo "== Fetching ${wanted%% pytest*} for arm64"
  rm -rf "$packages"
  # shellcheck disable=SC2086  # several words are meant
  "$native" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --target "$packages" \
    --implementation cp --python-version "${python#python}" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 $wanted
  echo "$wanted" >"$packages/complete"
fi

# Under qemu, LLVM would read about this machine's processor: another is named, M1 unless the caller names one.
cat >"$folder/python" <<END
#!/bin/sh
export PYTHONNOUSERSITE=1 PYTHONPATH="$packages\${PYTHONPATH:+:\$PYTHONPATH}" NUMBA_CACHE_DIR="$folder/cache"
export NUMBA_CPU_NAME="\${NUMBA_CPU_NAME:-apple-m1}" NUMBA_CPU_FEATURES="\${NUMBA_CPU_FEATURES-}"
unset LD_LIBRARY_PATH
exec "$qemu" -L "$root" "$root/usr/bin/$python" "\$@"
END
chmod +x "$folder/python"
