#!/usr/bin/env bash
# Unpack another suite's HAProxy beside the system's, without touching dpkg or
# apt state: a private apt root with an empty package database makes apt resolve
# every dependency, and the copied binary gets its own loader and library path,
# so that it stays an ordinary executable (a reload re-executes it).
#
#   haproxy.sh SUITE NAME DIR      e.g.  haproxy.sh trixie 3.0 ~/.cache/haproxy-connect
set -euo pipefail
suite=$1 name=$2 lab=$3
out=$lab/bin/haproxy-$name
if [ -x "$out" ] && "$out" -v >/dev/null 2>&1; then exit 0; fi
mirror=${DEBIAN_MIRROR:-}
if [ -z "$mirror" ] && [ -r /etc/apt/sources.list.d/debian.sources ]; then
	mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources)
fi
if [ -z "$mirror" ] && [ -r /etc/apt/sources.list ]; then
	mirror=$(awk '/^deb /{for (i=2;i<=NF;i++) if ($i ~ /^https?:/) {print $i; exit}}' /etc/apt/sources.list)
fi
: "${mirror:?no Debian mirror found in the sources of apt: set DEBIAN_MIRROR}"
mirror=${mirror%/}
root=$lab/suite/$suite apt=$lab/apt/$suite
mkdir -p "$root" "$lab/bin" "$apt"/{etc/apt/{apt.conf.d,preferences.d,sources.list.d,trusted.gpg.d},var/lib/apt/lists/partial,var/lib/dpkg,var/cache/apt/archives/partial}
: >"$apt/var/lib/dpkg/status"
{
	printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" "$suite"
	case $suite in
	sid | forky) ;;
	experimental) # it has what is new and nothing else: the rest comes from sid
		printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' "$mirror"
		;;
	*) printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s-security main\n' "${mirror%/debian}/debian-security" "$suite" ;;
	esac
} >"$apt/etc/apt/sources.list"
opts=(-o Dir="$apt" -o Dir::State::status="$apt/var/lib/dpkg/status" -o APT::Architecture="$(dpkg --print-architecture)"
	-o APT::Sandbox::User=root -o Acquire::Languages=none -o APT::Install-Recommends=false -o Debug::NoLocking=1)
apt-get "${opts[@]}" -qq update
package=haproxy
if [ "$suite" = experimental ]; then # by version: the name of the suite would bring more of it along
	package=haproxy=$(apt-cache "${opts[@]}" madison haproxy | awk '/experimental/{print $3; exit}')
fi
rm -f "$apt"/var/cache/apt/archives/*.deb
apt-get "${opts[@]}" -qq -y --download-only install "$package" >/dev/null
rm -rf "$root"
mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
for d in bin sbin lib lib64; do ln -s "usr/$d" "$root/$d"; done
keep='^(haproxy|libc6|libcrypt1|libcap2|libgcc-s1|liblua5|libopentracing|libpcre2-8|libssl3|libsystemd0|libstdc|zlib1g|libzstd1|liblz|libgcrypt|libgpg|libxxhash|libjemalloc)'
for d in "$apt"/var/cache/apt/archives/*.deb; do
	n=$(dpkg-deb -f "$d" Package)
	if [[ $n =~ $keep ]]; then
		dpkg-deb --fsys-tarfile "$d" | tar -x -C "$root" --keep-directory-symlink
	fi
done
tmp=$out.$$
cp "$root/usr/sbin/haproxy" "$tmp"
loader=$(find "$root/usr" -name 'ld-linux*.so.*' | head -1)
patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$(dirname "$loader")" "$tmp"
mv "$tmp" "$out"
rm -f "$apt"/var/cache/apt/archives/*.deb
"$out" -v | head -1
