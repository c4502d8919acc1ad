-- The announce workload of tests/bench.py, for wrk. Environment:
--   HASHES  file of info_hashes, 40 hex digits a line      SWARMS  how many of them
--   PEERS   peers a swarm                                   CLOSE   1: a connection each
--   WARM    1: every peer once, in order; else at random
-- One in three is a seeder. They come from one address, and differ in peer_id and port.
local swarms, peers = tonumber(os.getenv("SWARMS")), tonumber(os.getenv("PEERS"))
local warm = os.getenv("WARM") == "1"
local close = os.getenv("CLOSE") == "1" and "Connection: close\r\n" or ""
local escaped, next_peer = {}, -1
for line in io.lines(os.getenv("HASHES")) do
  escaped[#escaped + 1] = (line:gsub("..", "%%%0"))
end
math.randomseed(42)

request = function()
  next_peer = warm and (next_peer + 1) % (swarms * peers) or math.random(0, swarms * peers - 1)
  local member = math.floor(next_peer / swarms)
  return string.format(
    "GET /announce?info_hash=%s&peer_id=-TR4040-%012d&port=%d&uploaded=0&downloaded=0"
      .. "&left=%d&numwant=50&key=2C4DEC5F&compact=1&supportcrypto=1 HTTP/1.1\r\n"
      .. "Host: t\r\nUser-Agent: Transmission/4.04\r\nAccept-Encoding: deflate, gzip\r\n%s\r\n",
    escaped[next_peer % swarms + 1], next_peer, 1024 + member * 7 % 64000,
    member % 3 == 0 and 0 or 1000, close)
end
