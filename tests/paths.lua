-- The other requests of tests/bench.py, for wrk. It reads this environment variable:
--   PATHS  file of paths, one per line; each request asks for one of them at random
local paths = {}
for line in io.lines(os.getenv("PATHS")) do
  paths[#paths + 1] = line
end
math.randomseed(42)

request = function()
  return string.format(
    "GET %s HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n", paths[math.random(#paths)])
end
